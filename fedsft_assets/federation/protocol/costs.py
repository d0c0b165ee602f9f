"""What a job costs besides time: bytes between server and sites, CPU seconds, memory.

Every value is a total from the start of the execution on, over all attempts, and travels as a point like losses do.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from fedsft_assets.federation.protocol.phases import PREFIX, phase_of, round_to_ms
from fedsft_assets.federation.protocol.points import TRAIN_LOSS, Point

SENT = f"{PREFIX}sent_bytes"  # by a site, to the server
RECEIVED = f"{PREFIX}received_bytes"  # by a site, from the server
CPU_SECONDS = f"{PREFIX}cpu_seconds"  # of a site's trainer processes
SERVER_CPU_SECONDS = f"{PREFIX}server_cpu_seconds"  # of the job's server process
PEAK_MEMORY = f"{PREFIX}peak_memory_bytes"  # of a site's largest trainer process

COSTS_OF_A_SITE = (SENT, RECEIVED, CPU_SECONDS, PEAK_MEMORY)


def is_cost(metric: str) -> bool:
    """Whether a metric says what a job costs, in seconds of a phase or otherwise, and not what it learns."""
    return phase_of(metric) is not None or metric in (*COSTS_OF_A_SITE, SERVER_CPU_SECONDS)


@dataclass(frozen=True)
class Costs:
    """The costs of a job; what no site has reported is None.

    `steps` are optimizer steps whose results are in the model, all sites together. `traffic` has, by site, the bytes
    that it has `sent` and `received`. `cpu_seconds` are those of all trainer processes and of the server, `peak_memory`
    is that of the largest trainer process in bytes (see `meter.Usage`). `transferred[k]` are the bytes of all sites in
    both directions until the model after k rounds was scored.
    """

    steps: int
    traffic: dict[str, dict[str, int]] | None
    cpu_seconds: float | None
    peak_memory: int | None
    transferred: list[int] | None


def costs_of(points: Collection[Point], rounds: int, missed: Collection[tuple[str, int]] = ()) -> Costs:
    """The costs from all points of a job; `missed` are sites and the rounds (1-based) without a result of theirs."""
    steps = [one for one in points if one.name == TRAIN_LOSS and one.site and (one.site, one.round) not in missed]
    sent, received, cpu, memory = (_totals(points, name) for name in COSTS_OF_A_SITE)
    server = _totals(points, SERVER_CPU_SECONDS)
    moved = [one for one in points if one.name in (SENT, RECEIVED)]
    traffic = {site: {"sent": int(sent[site]), "received": int(received[site])} for site in sorted(sent)}
    return Costs(
        steps=len(steps),
        traffic=traffic or None,
        cpu_seconds=round_to_ms(sum(cpu.values()) + sum(server.values())) if cpu else None,
        peak_memory=int(max(memory.values())) if memory else None,
        transferred=[_transferred(moved, k) for k in range(rounds + 1)] if traffic else None,
    )


def _transferred(points: Iterable[Point], rounds: int) -> int:
    """Bytes in both directions, as known when the model after `rounds` rounds was scored; `points` are of traffic."""
    by_then = [point for point in points if point.round <= rounds]
    return int(sum(sum(_totals(by_then, name).values()) for name in (SENT, RECEIVED)))


def _totals(points: Iterable[Point], name: str) -> dict[str, float]:
    """The largest value of a metric by site; that of the server has an empty name."""
    totals: defaultdict[str, float] = defaultdict(float)
    for point in points:
        if point.name == name:
            totals[point.site or ""] = max(point.value, totals[point.site or ""])
    return totals
