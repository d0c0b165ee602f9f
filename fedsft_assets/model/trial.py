"""Helpers for trying out a model: token ids, their lengths, and a context that leaves the model unchanged."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def undisturbed(lm: Any) -> Iterator[None]:
    """Within the block there is no dropout and no gradient; mode and random state are restored afterwards."""
    training = lm.training
    lm.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        lm.train(training)


def some_ids(lm: Any, count: int) -> Tensor:
    """Token ids [count] spread over the vocabulary, different for each count."""
    embeddings = lm.get_input_embeddings()
    return (torch.arange(count, device=embeddings.weight.device) * 7919 + count) % embeddings.num_embeddings


def long_ids(lm: Any, window: int) -> Tensor:
    """The ids of a record longer than a window: one token repeated, then others for longer than the window.

    Whether the end still sees the beginning then makes a large difference, for any window size.
    """
    ids = some_ids(lm, at_most(lm, 2 * window + 3))
    ids[: window + 1] = ids[0]
    return ids


def at_most(lm: Any, count: int) -> int:
    """`count`, limited to the model's number of positions."""
    return min(count, position_limit(lm.config.get_text_config()) or count)


def largest_window(config: Any, longest: int | None) -> int | None:
    """The size in tokens of the largest attention window or chunk that a record can exceed; None if there is none.

    `longest` is the maximum number of tokens of a record; None is unlimited.
    """
    text = config.get_text_config()
    limits = [size for size in (longest, position_limit(text)) if size]
    # A window as long as the longest record is never exceeded.
    windows = [size for size in _windows(text.to_dict()) if all(size < limit for limit in limits)]
    return max(windows, default=None)


def position_limit(config: Any) -> int | None:
    """The maximum number of tokens of a record by a text model's configuration; None if it has no limit."""
    found = next((size for name in _POSITIONS if isinstance(size := getattr(config, name, None), int)), None)
    return found if found and found > 0 else None


_POSITIONS = ("max_position_embeddings", "max_seq_len", "max_target_positions")  # most models, MPT, Whisper's decoder


def _windows(config: Mapping[str, Any]) -> Iterator[int]:
    """Yield all sizes named after a window or chunk; false positives only make the trial longer."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _windows(value)
        elif "window" in str(name) or "chunk" in str(name):
            sizes = value if isinstance(value, list | tuple) else [value]
            yield from (size for size in sizes if type(size) is int and size > 0)
