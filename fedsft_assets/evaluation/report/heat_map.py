"""Models by datasets as a heat map: losses with intervals, in steps of one hue, readable without colors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedsft_assets.evaluation.statistics.intervals import Estimate

STEPS = 9  # colors in report.css


@dataclass(frozen=True)
class Cell:
    """A loss and its interval as texts; `step` is 0 for the highest loss of a column, 8 for the lowest.

    `best` marks the lowest of the trained models on the dataset.
    """

    loss: str
    interval: str
    step: int
    best: bool


def heat_map(
    models: Sequence[str], scores: Mapping[str, Mapping[str, Estimate]], trained: Sequence[str]
) -> dict[str, list[Cell]]:
    """A row of cells for each model, a column for each dataset of `scores`.

    `trained` are the models among which the lowest of each column is marked.
    """
    columns = []
    for found in scores.values():
        losses = [found[model].value for model in models]
        lowest = min(found[model].value for model in trained)
        columns.append([_cell(found[model], losses, model in trained, lowest) for model in models])
    return {model: [column[row] for column in columns] for row, model in enumerate(models)}


def _cell(found: Estimate, losses: Sequence[float], trained: bool, lowest: float) -> Cell:
    known = math.isfinite(found.high - found.low)
    interval = f"{found.low:.3f}–{found.high:.3f}" if known else "unknown"
    best = trained and found.value == lowest
    return Cell(f"{found.value:.3f}", interval, round(_depth(found.value, losses) * (STEPS - 1)), best)


def _depth(loss: float, losses: Sequence[float]) -> float:
    """0 for the highest loss, 1 for the lowest; by the logarithm, as an untrained model is far from all others."""
    low, high = min(losses), max(losses)
    if low == high:
        return 0.0
    return math.log(high / loss) / math.log(high / low) if low > 0 else (high - loss) / (high - low)
