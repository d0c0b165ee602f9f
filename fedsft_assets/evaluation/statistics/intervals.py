"""Intervals of losses and of their differences, with the prompts and the seeds as sources of variance."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from fedsft_assets.evaluation.statistics.bootstrap import pivots, quantile
from fedsft_assets.evaluation.statistics.prompt_losses import Numbers, PromptLosses
from fedsft_assets.evaluation.statistics.variance import (
    Contrast,
    Parts,
    difference_contrast,
    parts_of,
    score_contrast,
)

RESAMPLES = 2000
SEED = 1234
LEVEL = 0.05

# For an error probability, how many standard errors over prompts an interval reaches below the value, and above it.
Reach = Callable[[float], tuple[float, float]]
Pair = tuple[str, str]


@dataclass(frozen=True)
class Estimate:
    """A loss, or a difference of two, in nats a token.

    `low` to `high` is the 95 % interval, `p_value` the smallest error probability whose interval leaves out 0.
    `seeds` are those of each job in it, `records` those that all its models were scored on.
    """

    value: float
    low: float
    high: float
    p_value: float
    parts: Parts
    records: int
    seeds: tuple[int, ...]

    @property
    def deviation(self) -> float | None:
        """The standard deviation over seeds; None with one seed, and of a difference where seeds are not paired."""
        if len(self.parts.seeds) != 1:
            return None
        part = self.parts.seeds[0]
        return math.sqrt(part.variance * part.seeds)


def score_jobs(scores: PromptLosses, *, resamples: int = RESAMPLES, seed: int = SEED) -> dict[str, Estimate]:
    """The loss of each job, the mean over its seeds, with its interval."""
    jobs = sorted({model.job for model in scores.models})
    contrasts = [score_contrast(scores.models, job) for job in jobs]
    return dict(zip(jobs, _estimates(scores, contrasts, resamples, seed), strict=True))


def compare_pairs(
    scores: PromptLosses, pairs: Sequence[Pair], *, resamples: int = RESAMPLES, seed: int = SEED
) -> dict[Pair, Estimate]:
    """For each (job, other) the loss of job minus that of other: below 0 the job is better.

    Raises ValueError for more pairs than so many resamples could ever decide, corrected for their number.
    """
    least = math.ceil(2 * len(pairs) / LEVEL) - 1
    if resamples < least:
        raise ValueError(f"{resamples} resamples cannot decide {len(pairs)} pairs; take at least {least}")
    contrasts = [difference_contrast(scores.models, *pair) for pair in pairs]
    return dict(zip(pairs, _estimates(scores, contrasts, resamples, seed), strict=True))


def interval(parts: Parts, reach: Reach, level: float = LEVEL) -> tuple[float, float]:
    below, above = _margins(parts, reach, level)
    return parts.value - below, parts.value + above


def estimate(parts: Parts, reach: Reach, least_p: float, records: int, seeds: tuple[int, ...]) -> Estimate:
    low, high = interval(parts, reach)
    return Estimate(parts.value, low, high, _p_value(parts, reach, least_p), parts, records, seeds)


def student_reach(degrees: float) -> Reach:
    def reach(level: float) -> tuple[float, float]:
        one = student(degrees, 1 - level / 2)
        return one, one

    return reach


def student(degrees: float, probability: float) -> float:
    """The quantile of Student's t; infinite without a degree of freedom."""
    return float(stdtrit(degrees, probability)) if degrees > 0 else math.inf


def _margins(parts: Parts, reach: Reach, level: float) -> tuple[float, float]:
    """How far the interval goes below the value, and above: each source's own reach, and their squares added."""
    over_seeds = sum(student(part.seeds - 1, 1 - level / 2) ** 2 * part.variance for part in parts.seeds)
    below, above = (math.sqrt(_squared(side, parts.prompts) + over_seeds) for side in reach(level))
    return below, above


def _squared(reach: float, variance: float) -> float:
    if variance in (0, math.inf):
        return variance
    return max(reach, 0.0) ** 2 * variance


def _p_value(parts: Parts, reach: Reach, least: float) -> float:
    if parts.value == 0:
        return 1.0
    side = 0 if parts.value > 0 else 1

    def excludes(level: float) -> bool:
        return _margins(parts, reach, level)[side] < abs(parts.value)

    low, high = math.log(least), 0.0
    if excludes(least):
        return least
    if not excludes(1.0):
        return 1.0
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if excludes(math.exp(middle)) else (middle, high)
    return math.exp(high)


def _estimates(scores: PromptLosses, contrasts: Sequence[Contrast], resamples: int, seed: int) -> list[Estimate]:
    if not contrasts:
        return []
    tokens, total = scores.tokens, scores.tokens.sum()
    effective = float(total**2 / np.sum(tokens**2))
    found, means = [], []
    for contrast in contrasts:
        losses = contrast.rows @ scores.losses
        rates: Numbers = losses.sum(axis=1) / total
        residuals = losses - rates[:, None] * tokens
        found.append(parts_of(rates, residuals @ residuals.T, float(total), scores.prompts, effective, contrast.sizes))
        mean = contrast.mean @ scores.losses
        means.append(mean - found[-1].value * tokens)
    deviations = pivots(np.stack(means), tokens, resamples, seed)
    return [
        estimate(parts, _bootstrap_reach(ordered), 2 / (resamples + 1), scores.records, contrast.seeds)
        for parts, ordered, contrast in zip(found, deviations, contrasts, strict=True)
    ]


def _bootstrap_reach(ordered: Numbers) -> Reach:
    """A resample's deviation has the sign of the value's own, so the upper end tells how far the truth may be below."""

    def reach(level: float) -> tuple[float, float]:
        return quantile(ordered, 1 - level / 2), -quantile(ordered, level / 2)

    return reach
