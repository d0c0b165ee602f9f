"""Checks of weights before training: names and shapes, dtypes, ties, and finite values."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedsft_assets.model.errors import ModelError, listed

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def require_same_shapes(own: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], claim: str) -> None:
    """Raise ModelError that begins with `claim` if names or shapes differ."""
    problems = [f"missing {name}" for name in own if name not in given]
    problems += [f"unexpected {name}" for name in given if name not in own]
    problems += [
        f"{name} has shape {given[name]}, expected {shape}"
        for name, shape in own.items()
        if name in given and given[name] != shape
    ]
    if problems:
        raise ModelError(f"{claim}: {listed(problems, '; ')}")


def require_floats(own: Mapping[str, Tensor], found: Mapping[str, torch.dtype], where: str = "") -> None:
    """Raise ModelError that begins with `where` if a floating point weight is stored as an integer or FP8.

    Such values are meaningless without their scales.
    """
    for name, tensor in own.items():
        if tensor.is_floating_point() and name in found and found[name] not in _FLOATS:
            raise ModelError(
                f"{where}{name}: has values of {str(found[name]).removeprefix('torch.')}, expected floating point"
                " numbers of 16, 32 or 64 bits; quantized weights cannot be trained: use the unquantized weights"
            )


def require_equal_ties(tied: Mapping[str, str], read: Callable[[str], Tensor | None], where: str = "") -> None:
    """Raise ModelError that begins with `where` if tied weights have different values, of which one would be lost."""
    for name, first in tied.items():
        one, other = read(name), read(first)
        if one is not None and other is not None and bool((one != other).any()):
            raise ModelError(
                f"{where}{name} differs from {first}, but the configuration ties them"
                " (tie_word_embeddings: true); set it to false if the model has both"
            )


def require_finite(lm: Any, where: Callable[[str], str] = str) -> None:
    """Raise ModelError if a weight is NaN or infinite; `where` maps a weight's name to the message's beginning."""
    for name, parameter in lm.named_parameters():
        require_finite_values(where(name), parameter.detach())


def require_finite_values(name: str, values: Tensor) -> None:
    """Raise ModelError that begins with `name` if a value is NaN or infinite."""
    if not values.numel() or all(bool(extreme.isfinite()) for extreme in values.aminmax()):
        return
    wrong = values.numel() - int(values.isfinite().sum())
    raise ModelError(
        f"{name}: {wrong:,} of {values.numel():,} weights are NaN or infinite: their training diverged,"
        " or the file is damaged; use an earlier checkpoint, or download it again"
    )
