"""What a trial of a model needs: tokens to try it with, how long they must be, and that nothing of it remains."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def undisturbed(lm: Any) -> Iterator[None]:
    """For a trial: no dropout, no gradients, and the random state afterwards as before."""
    training = lm.training
    lm.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        lm.train(training)


def some_ids(lm: Any, count: int) -> Tensor:
    """Token ids [count] of all over the vocabulary, other ones for each count."""
    embeddings = lm.get_input_embeddings()
    return (torch.arange(count, device=embeddings.weight.device) * 7919 + count) % embeddings.num_embeddings


def long_ids(lm: Any, window: int) -> Tensor:
    """A record beyond a window: one token over and over, then others for longer than the window.

    What still sees the beginning at its end is far from what does not, however large the window is.
    """
    ids = some_ids(lm, at_most(lm, 2 * window + 3))
    ids[: window + 1] = ids[0]
    return ids


def at_most(lm: Any, count: int) -> int:
    """That many tokens, or as many as the model has positions for."""
    return min(count, position_limit(lm.config.get_text_config()) or count)


def largest_window(config: Any, longest: int | None) -> int | None:
    """How many tokens the widest of a model's windows or chunks of attention has that a record can outgrow.

    `longest` is how many tokens a record may have; None is any number. None if no record outgrows one.
    """
    text = config.get_text_config()
    limits = [size for size in (longest, position_limit(text)) if size]
    # A window of as many tokens as the longest record is never left.
    windows = [size for size in _windows(text.to_dict()) if all(size < limit for limit in limits)]
    return max(windows, default=None)


def position_limit(config: Any) -> int | None:
    """How many tokens a record may have according to a text model's configuration; None if it does not say."""
    found = next((size for name in _POSITIONS if isinstance(size := getattr(config, name, None), int)), None)
    return found if found and found > 0 else None


_POSITIONS = ("max_position_embeddings", "max_seq_len", "max_target_positions")  # most models, MPT, Whisper's decoder


def _windows(config: Mapping[str, Any]) -> Iterator[int]:
    """All sizes that are named after a window or a chunk: too many cost a longer trial, nothing else."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _windows(value)
        elif "window" in str(name) or "chunk" in str(name):
            sizes = value if isinstance(value, list | tuple) else [value]
            yield from (size for size in sizes if type(size) is int and size > 0)
