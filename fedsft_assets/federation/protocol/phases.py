"""Where the seconds of a job go, by phase: measured at each site, reported with every result."""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from fedsft_assets.federation.protocol.points import Point

# Set by whoever starts a job on the same machine as its sites: the time in seconds since the epoch.
JOB_STARTED = "FEDSFT_JOB_STARTED"
PHASES = ("start", "import", "load", "tokenize", "train", "validate", "transfer")
_PREFIX, _SUFFIX = "system/", "_seconds"  # MLflow shows metrics of that prefix apart, after the losses


class PhaseClock:
    """Seconds of one trainer since its job started.

    `start` runs until its Python runs, `import` until its code is loaded, `load` reads the base model,
    `tokenize` the records; `train` and `validate` are what they say; `transfer` is from a result until the
    next model is there, so it contains the wait for other sites.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def add(self, phase: str, seconds: float) -> None:
        self._seconds[phase] += seconds

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block's time to a phase."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - begun)

    def points(self, round: int, samples: int, site: str) -> list[Point]:
        """The seconds so far of every phase."""
        return [
            Point(metric_name(name), round_to_ms(seconds), round, samples, site)
            for name, seconds in self._seconds.items()
        ]


def metric_name(phase: str) -> str:
    """What the seconds of a phase are called among the metrics of a job."""
    return f"{_PREFIX}{phase}{_SUFFIX}"


def phase_of(metric: str) -> str | None:
    """The phase whose seconds the metric of that name has; None for any other metric."""
    phase = metric.removeprefix(_PREFIX).removesuffix(_SUFFIX)
    return phase if metric == metric_name(phase) else None


def longest_phases(points: Iterable[Point]) -> dict[str, float]:
    """The seconds of each phase at the site where it took longest, from all points of a job."""
    longest: dict[str, float] = {}
    for point in points:
        if name := phase_of(point.name):
            longest[name] = max(point.value, longest.get(name, 0.0))
    return longest


def round_to_ms(seconds: float) -> float:
    return round(seconds, 3)
