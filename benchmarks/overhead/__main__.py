"""Compares what a federation costs with the same training in one process, Flower's simulation and NVFlare's simulator.

Run `python -m benchmarks.overhead` from the project's root, on Linux. All train the same model on the same real
records of three sites, and nobody may do less work. The part `sites` runs our job with more and more sites. The last
lines are the targets, each as `NAME VALUE TARGET ok|short`; a target that is short is no error, unequal work is.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from benchmarks.data import PROJECT, SAMPLES, BenchmarkError, Target, print_targets, require_samples, say
from benchmarks.overhead.contenders import (
    CONTENDERS,
    FLOWER_DEFAULT,
    OURS,
    PEERS,
    PLAIN,
    Contenders,
    Run,
)
from benchmarks.overhead.equal import require_equal_work
from benchmarks.overhead.input import Input, Part

STUDY, SITES = "study", "sites"
_SITES = (3, 10, 30, 100)
_FLOWER = PROJECT / ".venv" / "flower" / "bin" / "python"
_SHORT = Part(rounds=2, steps=2, evaluation_records=8)  # for many sites

Runs = dict[str, list[Run]]


def main() -> None:
    """Measure the parts, print a table for each and then the targets."""
    args = _arguments()
    require_samples()
    print_targets("overhead", args.keep, lambda work: Benchmark(args, work).run())


class Benchmark:
    """The parts of one run."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self._args, self._work = args, work
        self._environment = environment(work)

    def run(self) -> list[Target]:
        say(f"{len(os.sched_getaffinity(0))} CPUs, load average {os.getloadavg()[0]:.1f}")
        targets = []
        for name in self._args.part:
            targets += {STUDY: self._study, SITES: self._sites}[name]()
        say(f"load average at the end {os.getloadavg()[0]:.1f}\n")
        return targets

    def _study(self) -> list[Target]:
        """All contenders in turn, as often as wanted, so that a slow minute meets them all."""
        given = self._input(STUDY, Part().quick() if self._args.quick else Part())
        contenders = self._contenders(given)
        contenders.warm_up(self._args.contender)
        runs: Runs = {name: [] for name in self._args.contender}
        for _ in range(self._args.repeats):
            for name in self._args.contender:
                runs[name].append(contenders.run(name))
        study_table(runs)
        require_equal_work(given, runs)
        return study_targets(runs)

    def _sites(self) -> list[Target]:
        part = _SHORT.quick() if self._args.quick else _SHORT
        runs: dict[int, list[Run]] = {sites: [] for sites in self._args.sites}
        given = {sites: self._input(f"{SITES}-{sites}", part, sites) for sites in runs}
        self._contenders(next(iter(given.values()))).warm_up([OURS])
        for _ in range(self._args.sites_repeats):
            for sites, tries in runs.items():
                tries.append(self._contenders(given[sites]).run(OURS))
        sites_table(runs)
        for sites, tries in runs.items():
            require_equal_work(given[sites], {OURS: tries})
        return sites_targets(runs)

    def _contenders(self, given: Input) -> Contenders:
        return Contenders(given, given.folder, self._environment, self._args.flower_python)

    def _input(self, name: str, part: Part, sites: int | None = None) -> Input:
        """What contenders are given: the three sites of the published study, or so many that are generated."""
        folder = self._work / name
        described = [str(SAMPLES), str(folder), json.dumps(asdict(part)), *([] if sites is None else [str(sites)])]
        command = [sys.executable, "-m", "benchmarks.overhead.data", *described]
        done = subprocess.run(command, cwd=PROJECT, env=self._environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchmarkError(f"the input of {name} could not be made:\n{done.stderr[-4000:]}")
        return Input(folder)


def study_table(runs: Runs) -> None:
    """The medians of each contender, of its wall seconds the least and the most, and the most that others disturbed."""
    say(
        f"\n{STUDY:16}{'wall s':>8}{'from':>7}{'to':>7}{'CPU s':>8}{'others':>8}{'RSS GB':>8}{'PSS GB':>8}"
        f"{'processes':>11}{'start to first step s':>23}{'last step to end s':>20}{'last loss':>11}"
    )
    for name, tries in runs.items():
        seconds = [run.cost.seconds for run in tries]
        say(
            f"{name:16}{median(seconds):8.1f}{min(seconds):7.1f}{max(seconds):7.1f}"
            f"{_median(tries, lambda run: run.cost.cpu_seconds):8.1f}"
            f"{max(run.cost.other_cpu_seconds for run in tries):8.1f}"
            f"{_median(tries, lambda run: run.cost.rss_gb):8.2f}{_median(tries, lambda run: run.cost.pss_gb):8.2f}"
            f"{max(run.cost.processes for run in tries):11}"
            f"{_median(tries, lambda run: run.seconds_before):23.1f}"
            f"{_median(tries, lambda run: run.seconds_after):20.1f}"
            f"{max(tries[0].scored, key=lambda one: one.round).loss:11.4f}"
        )


def study_targets(runs: Runs) -> list[Target]:
    """Those that the contenders that took part allow."""
    if OURS not in runs:
        return []
    ours = runs[OURS]
    seconds = {name: _median(tries, lambda run: run.cost.seconds) for name, tries in runs.items()}
    peers = [seconds[name] for name in PEERS if name in seconds]
    targets = []
    if peers:
        targets.append(Target("overhead_vs_best_peer", seconds[OURS] / min(peers), 0.75))
    if PLAIN in seconds:
        targets.append(Target("overhead_vs_plain", seconds[OURS] / seconds[PLAIN], 1.0))
    return [
        *targets,
        Target("overhead_fixed_seconds", _median(ours, lambda run: run.seconds_before + run.seconds_after), 12),
        Target("overhead_pss_gb", _median(ours, lambda run: run.cost.pss_gb), 2.5),
    ]


def sites_table(runs: dict[int, list[Run]]) -> None:
    """What a site costs where so many take part, the fixed part shared among them, and what each more costs."""
    say(
        f"\n{SITES:>6}{'wall s':>9}{'CPU s':>9}{'others':>8}{'PSS GB':>9}{'processes':>11}"
        f"{'s per site':>12}{'MB per site':>13}{'s per site more':>17}{'MB per site more':>18}"
    )
    fewest = min(runs)
    first = _seconds_and_gb(runs[fewest])
    for sites, tries in runs.items():
        seconds, gb = _seconds_and_gb(tries)
        more = sites - fewest
        say(
            f"{sites:6}{seconds:9.1f}{_median(tries, lambda run: run.cost.cpu_seconds):9.1f}"
            f"{max(run.cost.other_cpu_seconds for run in tries):8.1f}{gb:9.2f}"
            f"{max(run.cost.processes for run in tries):11}{seconds / sites:12.2f}{gb * 1000 / sites:13.1f}"
            + (f"{(seconds - first[0]) / more:17.2f}{(gb - first[1]) * 1000 / more:18.1f}" if more else "")
        )


def sites_targets(runs: dict[int, list[Run]]) -> list[Target]:
    """A site's share of seconds and of memory where it is largest, as a multiple of that with the fewest sites."""
    shares = {sites: tuple(value / sites for value in _seconds_and_gb(tries)) for sites, tries in sorted(runs.items())}
    fewest, *more = shares.values()
    if not more:
        return []
    return [
        Target("sites_seconds_growth", max(share[0] for share in more) / fewest[0], 1.0),
        Target("sites_memory_growth", max(share[1] for share in more) / fewest[1], 1.0),
    ]


def _seconds_and_gb(tries: Sequence[Run]) -> tuple[float, float]:
    return _median(tries, lambda run: run.cost.seconds), _median(tries, lambda run: run.cost.pss_gb)


def _median(tries: Sequence[Run], of: Callable[[Run], float]) -> float:
    return median(of(run) for run in tries)


def environment(work: Path) -> dict[str, str]:
    """No network, nothing written to HOME, and threads as whoever trains takes them by default."""
    left_out = ("PYTHONDONTWRITEBYTECODE", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    kept = {
        name: value for name, value in os.environ.items() if name not in left_out and not name.startswith("FEDSFT_")
    }
    return {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(work / "hub"),
        "MPLCONFIGDIR": str(work / "matplotlib"),
        "XDG_CACHE_HOME": str(work / "cache"),
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__)
    parser.add_argument("--part", action="append", choices=(STUDY, SITES), help="leave out the other")
    parser.add_argument(
        "--contender", action="append", choices=CONTENDERS, help="leave out the others; may be repeated"
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each contender, interleaved (default 3)")
    parser.add_argument(
        "--flower-python",
        default=str(_FLOWER if _FLOWER.is_file() else sys.executable),
        metavar="PYTHON",
        help="interpreter with the extra `rivals` (default: that of .venv/flower if there is one, else this one)",
    )
    parser.add_argument("--sites", type=int, nargs="+", default=_SITES, help="numbers of sites (default 3 10 30 100)")
    parser.add_argument("--sites-repeats", type=int, default=1, help="runs of each number of sites (default 1)")
    parser.add_argument("--quick", action="store_true", help="a few small steps: shows that it runs, not what it costs")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work in this folder and leave all files there")
    args = parser.parse_args()
    args.part = args.part or [STUDY, SITES]
    args.contender = args.contender or [name for name in CONTENDERS if name != FLOWER_DEFAULT]
    if min(args.repeats, args.sites_repeats, *args.sites) < 1:
        parser.error("--repeats, --sites-repeats and --sites must be at least 1")
    return args


if __name__ == "__main__":
    main()
