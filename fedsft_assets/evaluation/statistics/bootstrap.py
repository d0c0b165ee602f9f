"""The bootstrap over prompts: how far a ratio of sums strays from the truth, counted in its own standard errors."""

import numpy as np

from fedsft_assets.evaluation.statistics.prompt_losses import Numbers

_BYTES = 32 * 1024**2  # of drawn counts held at a time


def pivots(residuals: Numbers, tokens: Numbers, resamples: int, seed: int) -> Numbers:
    """Sorted studentized deviations [P, resamples] of P ratios of sums over the same C prompts (bootstrap-t).

    `residuals` [P, C] are loss − ratio · tokens, which sum to 0, `tokens` is [C]. A resample draws C prompts with
    replacement, the same for all P. A deviation is infinite where a resample knows no spread.
    Efron and Tibshirani, An Introduction to the Bootstrap, chapter 12.5.
    """
    kinds, prompts = residuals.shape
    columns = np.concatenate([tokens[None], tokens[None] ** 2, residuals, residuals**2, residuals * tokens])
    generator = np.random.default_rng(seed)
    deviations = np.empty((kinds, resamples))
    at_once = max(1, _BYTES // (8 * prompts))
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        sums = _counts(generator, rows, prompts) @ columns.T
        token_sum, token_squares = sums[:, :1], sums[:, 1:2]
        sums, squares, products = np.split(sums[:, 2:], 3, axis=1)
        shift = sums / token_sum
        # The products cancel where all drawn prompts are one; what rounding leaves of them is no spread.
        spread = squares - 2 * shift * products + shift**2 * token_squares
        spread[spread <= 1e-12 * squares] = 0
        error = np.sqrt(spread * prompts / max(prompts - 1, 1)) / token_sum
        with np.errstate(divide="ignore", invalid="ignore"):
            found = np.where(shift == 0, 0.0, shift / error)
        deviations[:, start : start + rows] = found.T
    deviations.sort(axis=1)
    return deviations


def quantile(ordered: Numbers, probability: float) -> float:
    """Of sorted values [B] the one at rank (B + 1) · probability, between two neighbours, at most the outermost."""
    rank = min(max((len(ordered) + 1) * probability - 1, 0.0), len(ordered) - 1.0)
    below = int(rank)
    low, high = float(ordered[below]), float(ordered[min(below + 1, len(ordered) - 1)])
    return low if rank == below or low == high else low + (rank - below) * (high - low)


def _counts(generator: np.random.Generator, rows: int, prompts: int) -> Numbers:
    """How often each of C prompts is drawn in each of `rows` resamples, [rows, C]."""
    drawn = generator.integers(prompts, size=(rows, prompts))
    drawn += np.arange(rows)[:, None] * prompts
    return np.bincount(drawn.ravel(), minlength=rows * prompts).reshape(rows, prompts).astype(np.float64)
