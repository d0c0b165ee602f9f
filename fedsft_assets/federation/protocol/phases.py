"""Time accounting of a job by phase: measured at each site, reported with every result."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from fedsft_assets.federation.protocol.points import Point

# Start time of the job in seconds since the epoch; set if sites run on the submitter's machine.
JOB_STARTED = "FEDSFT_JOB_STARTED"
PHASES = ("start", "import", "load", "tokenize", "train", "validate", "transfer")
PREFIX = "system/"  # MLflow groups metrics with this prefix separately, after the losses
_SUFFIX = "_seconds"


class PhaseClock:
    """Seconds spent per phase by one trainer since its job started.

    `start`: until the Python process runs; `import`: loading code; `load`: reading the base model; `tokenize`:
    tokenizing records; `train` and `validate`; `transfer`: from sending a result until the next model has arrived,
    including the wait for other sites.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] += seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the block's duration to a phase."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - begun)

    def points(self, round: int, samples: int, site: str) -> list[Point]:
        """The seconds so far, one point per phase."""
        return [
            Point(metric_name(name), round_to_ms(seconds), round, samples, site)
            for name, seconds in self._seconds.items()
        ]


def metric_name(phase: str) -> str:
    """Name of the metric for the seconds of a phase."""
    return f"{PREFIX}{phase}{_SUFFIX}"


def phase_of(metric: str) -> str | None:
    """The phase whose seconds a site reports by this metric, or None for another metric."""
    phase = metric.removeprefix(PREFIX).removesuffix(_SUFFIX)
    return phase if phase in PHASES and metric == metric_name(phase) else None


def longest_phases(points: Iterable[Point]) -> dict[str, float]:
    """Seconds of each phase at its slowest site, from all points of a job."""
    longest: dict[str, float] = {}
    for point in points:
        if name := phase_of(point.name):
            longest[name] = max(point.value, longest.get(name, 0.0))
    return longest


def round_to_ms(seconds: float) -> float:
    return round(seconds, 3)
