"""Where the uncertainty of a loss, or of a difference of two, comes from: which prompts were drawn, and which seeds.

A loss is a ratio of sums, Σ loss / Σ tokens, so its variance is that of a ratio estimator (delta method): a prompt
counts with its residual, loss − ratio · tokens. Seeds and prompts are crossed, as every model answers every prompt:
with S seeds and C prompts the variance is σ²(seeds)/S + σ²(prompts)/C + σ²(both)/(S·C), and the last part shows in the
spread over seeds as in the spread over prompts, so it is taken out of one of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedsft_assets.evaluation.statistics.prompt_losses import Model, Numbers, ScoresError


@dataclass(frozen=True)
class Contrast:
    """What is estimated, as a sum of means: `blocks` are [S, M] each, S rows of weights over M models.

    A block's rows are one for each seed: a model of the job, or where both jobs have the same seeds the difference of
    two. Its mean is one part of the value. `seeds` are those of each job, 0 of a model without training.
    """

    blocks: tuple[Numbers, ...]
    seeds: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The seeds of each block."""
        return tuple(len(block) for block in self.blocks)

    @property
    def rows(self) -> Numbers:
        """All blocks, one below the other."""
        return np.concatenate(self.blocks)

    @property
    def mean(self) -> Numbers:
        """The weights [M] of the models in the value."""
        return np.sum([block.mean(axis=0) for block in self.blocks], axis=0)


@dataclass(frozen=True)
class SeedPart:
    """The variance of a mean over seeds, with `seeds` − 1 degrees of freedom.

    `shared` estimates what of it comes from seeds and prompts at once: more prompts make that smaller too.
    """

    variance: float
    seeds: int
    shared: float


@dataclass(frozen=True)
class Parts:
    """A value in nats a token and its variance by source.

    `prompts` is the variance over prompts without what is already in `seeds`. `clusters` are the prompts,
    `effective_clusters` as many of equal tokens as would count the same.
    """

    value: float
    prompts: float
    seeds: tuple[SeedPart, ...]
    clusters: int
    effective_clusters: float

    @property
    def degrees(self) -> float:
        """Degrees of freedom of the variance over prompts, as few as the longest prompts make them.

        Satterthwaite's for residuals that grow with the tokens are (Σt²)²/Σt⁴ − 1. Fourth powers are not among the sums
        that a private site tells, and where tokens are spread as in instruction data (Σt²)²/Σt⁴ is near E²/C, with E
        effective clusters of C.
        """
        return self.effective_clusters**2 / self.clusters - 1

    @property
    def variance(self) -> float:
        return self.prompts + sum(part.variance for part in self.seeds)


def score_contrast(models: Sequence[Model], job: str) -> Contrast:
    """The mean loss of a job over its seeds."""
    own = _models_of(models, job)
    return Contrast((_block(models, own),), (_seeds(models, own),))


def difference_contrast(models: Sequence[Model], job: str, other: str) -> Contrast:
    """Job minus other: seed by seed where both have the same seeds, else mean minus mean."""
    if job == other:
        raise ScoresError(f"{job} cannot be compared with itself")
    ours, theirs = _models_of(models, job), _models_of(models, other)
    seeds = (_seeds(models, ours), _seeds(models, theirs))
    if [models[index].seed for index in ours] == [models[index].seed for index in theirs]:
        return Contrast((_block(models, ours) - _block(models, theirs),), seeds)
    return Contrast((_block(models, ours), -_block(models, theirs)), seeds)


def parts_of(
    rates: Numbers, covariances: Numbers, clusters: int, effective_clusters: float, sizes: Sequence[int]
) -> Parts:
    """The variance by source, from the ratios [R] of a contrast's rows and their covariances over prompts [R, R]."""
    weights = np.concatenate([np.full(size, 1 / size) for size in sizes])
    seeds = []
    for end, size in zip(np.cumsum(sizes), sizes, strict=True):
        block = slice(end - size, end)
        if size > 1:
            seeds.append(_seed_part(rates[block], covariances[block, block]))
    prompts = float(weights @ covariances @ weights) - sum(part.shared for part in seeds)
    return Parts(
        value=float(weights @ rates),
        prompts=max(prompts, 0.0) if clusters > 1 else math.inf,
        seeds=tuple(seeds),
        clusters=clusters,
        effective_clusters=effective_clusters,
    )


def _seed_part(rates: Numbers, covariances: Numbers) -> SeedPart:
    """Of one block of S rows, with their covariances [S, S]."""
    size = len(rates)
    both = float(np.trace(covariances) - covariances.sum() / size)
    return SeedPart(float(rates.var(ddof=1)) / size, size, max(both, 0.0) / (size - 1) / size)


def _models_of(models: Sequence[Model], job: str) -> list[int]:
    found = [index for index, model in enumerate(models) if model.job == job]
    if not found:
        jobs = ", ".join(sorted({model.job for model in models}))
        raise ScoresError(f"{job} has no scores; expected one of {jobs}")
    return sorted(found, key=lambda index: -1 if (seed := models[index].seed) is None else seed)


def _block(models: Sequence[Model], indices: Sequence[int]) -> Numbers:
    return np.eye(len(models))[list(indices)]


def _seeds(models: Sequence[Model], indices: Sequence[int]) -> int:
    return sum(models[index].seed is not None for index in indices)
