"""The bootstrap over prompts: what the distribution of a ratio of sums looks like, whatever its width."""

import numpy as np

from fedsft_assets.evaluation.statistics.prompt_losses import Numbers

_BYTES = 32 * 1024**2  # of drawn counts held at a time


def deviations(residuals: Numbers, tokens: Numbers, resamples: int, seed: int) -> Numbers:
    """How far P ratios of sums over the same C prompts stray in resamples, sorted [P, resamples].

    `residuals` [P, C] are loss − ratio · tokens, which sum to 0, `tokens` is [C]. A resample draws C prompts with
    replacement, the same for all P. Each row is in units of its own standard deviation; zeros where nothing varies.
    """
    kinds, prompts = residuals.shape
    columns = np.concatenate([tokens[None], residuals])
    generator = np.random.default_rng(seed)
    strayed = np.empty((kinds, resamples))
    at_once = max(1, _BYTES // (8 * prompts))
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        sums = _counts(generator, rows, prompts) @ columns.T
        strayed[:, start : start + rows] = (sums[:, 1:] / sums[:, :1]).T
    strayed.sort(axis=1)
    width = strayed.std(axis=1, keepdims=True)
    return np.divide(strayed, width, out=np.zeros_like(strayed), where=width > 0)


def _counts(generator: np.random.Generator, rows: int, prompts: int) -> Numbers:
    """How often each of C prompts is drawn in each of `rows` resamples, [rows, C]."""
    drawn = generator.integers(prompts, size=(rows, prompts))
    drawn += np.arange(rows)[:, None] * prompts
    return np.bincount(drawn.ravel(), minlength=rows * prompts).reshape(rows, prompts).astype(np.float64)
