"""What a testing split can show at all, and how many records or seeds would show what it cannot.

Miller, Adding Error Bars to Evals (arXiv 2411.00640), section 5, with Student's t in place of the normal distribution,
and seeds as a second source of variance.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from fedsft_assets.evaluation.statistics.intervals import student
from fedsft_assets.evaluation.statistics.variance import Parts

POWER = 0.8
MOST_RECORDS = 10_000_000
MOST_SEEDS = 100


@dataclass(frozen=True)
class Needed:
    """How many records or seeds in place of those at hand; None where more of them alone would not do."""

    records: int | None
    seeds: int | None


def detectable(parts: Parts, level: float) -> float:
    """The smallest difference in nats a token that is found with a probability of 80 % where it exists."""
    return _detectable(parts, level, 1.0, 1.0)


def needed(parts: Parts, records: int, level: float) -> Needed:
    """What would show the difference that was found, were it the true one, with a probability of 80 %."""
    target = abs(parts.value)
    if target == 0:
        return Needed(None, None)
    times = _least(lambda times: _detectable(parts, level, times, 1.0) <= target, MOST_RECORDS / records)
    most = [part.seeds for part in parts.seeds]
    times_seeds = (
        _least(lambda times: _detectable(parts, level, 1.0, times) <= target, MOST_SEEDS / max(most)) if most else None
    )
    return Needed(
        None if times is None else math.ceil(times * records),
        None if times_seeds is None else math.ceil(times_seeds * max(most)),
    )


def _detectable(parts: Parts, level: float, times_records: float, times_seeds: float) -> float:
    """As `detectable`, with so many times the records, and so many times the seeds."""
    total = _squared(parts.prompts / times_records, (parts.degrees + 1) * times_records - 1, level)
    for part in parts.seeds:
        shared = min(part.shared, part.variance)
        variance = (part.variance - shared + shared / times_records) / times_seeds
        total += _squared(variance, part.seeds * times_seeds - 1, level)
    return math.sqrt(total)


def _squared(variance: float, degrees: float, level: float) -> float:
    if variance == 0:
        return 0.0
    return (student(degrees, 1 - level / 2) + student(degrees, POWER)) ** 2 * variance


def _least(enough: Callable[[float], bool], most: float) -> float | None:
    """The smallest number from 1 to `most` that is enough, to a thousandth."""
    if not enough(most):
        return None
    low, high = 0.0, math.log(max(most, 1.0))
    if enough(1.0):
        return 1.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if enough(math.exp(middle)) else (middle, high)
    return math.exp(high)
