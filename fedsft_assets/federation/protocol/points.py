"""Points of a job's metric curves."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

VAL_LOSS = "val_loss"
VAL_LOSS_LOCAL = "val_loss_local"
TRAIN_LOSS = "train_loss"


def _now() -> float:
    return round(time.time(), 3)


@dataclass(frozen=True)
class Point:
    """One value of one curve.

    `round` counts finished rounds: 0 is the base model, k the model after round k. `samples` is the common x axis:
    records trained on so far by `site`, or by all sites if `site` is None. `step` (1-based within its round) is set for
    training steps; `tokens` is the number of answer tokens behind the value. `time` is when it was measured, in seconds
    since the epoch.
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
        """Key of the point: a job has one point per identity, even if a round is repeated."""
        return self.name, self.site, self.round, self.step


def points_to_data(points: list[Point]) -> list[dict[str, Any]]:
    """Points as plain dicts for sending, without the site, which the receiver knows."""
    return [{name: value for name, value in asdict(point).items() if name != "site"} for point in points]
