"""The points of a job's curves, and the durable file that they are appended to before anything else.

One JSON object a line. Written by the server part of a job, read by whoever watches it.
"""

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"

# What a site's result carries in its metadata beside the weights.
POINTS_KEY = "points"
SAMPLES_KEY = "samples"
FIRST_KEY = "first"  # digests of the base model and the adapters that a site began with, if it made them itself


def _now() -> float:
    return round(time.time(), 3)


@dataclass(frozen=True)
class Point:
    """One value of one curve.

    `round` counts finished rounds: 0 is the base model, k the model after round k. `samples` is the
    common axis: records trained on so far, by `site`, or by all sites together where `site` is None.
    `step` (1-based within its round) and `tokens` (answer tokens behind the value) belong to points of
    single steps. `time` is when it was measured, in seconds since the epoch.
    """

    name: str
    value: float
    round: int
    samples: int
    site: str | None = None
    step: int | None = None
    tokens: int | None = None
    time: float = field(default_factory=_now, compare=False)

    @property
    def identity(self) -> tuple[str, str | None, int, int | None]:
        """What it is the value of: a job has one point of each identity, also when a round is done twice."""
        return self.name, self.site, self.round, self.step


def append_points(path: Path, points: list[Point]) -> None:
    """Append whole lines and wait until they are on the disk."""
    lines = "".join(json.dumps(asdict(point)) + "\n" for point in points)
    with path.open("a", encoding="utf-8") as file:
        file.write(lines)
        file.flush()
        os.fsync(file.fileno())


def parse_point(line: str) -> Point:
    """A point from its line of the file."""
    return Point(**json.loads(line))


def points_to_data(points: list[Point]) -> list[dict[str, Any]]:
    """Points as plain values, to travel in the metadata of a result."""
    return [asdict(point) for point in points]


def points_from_data(data: list[dict[str, Any]]) -> list[Point]:
    """The reverse of `points_to_data`."""
    return [Point(**point) for point in data]
