"""What weights must be: a model's own, by names and shapes, and finite floating point numbers, to be trained."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fedsft_assets.model.errors import ModelError

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MOST_NAMED = 5


def require_same_shapes(own: Mapping[str, tuple[int, ...]], given: Mapping[str, tuple[int, ...]], claim: str) -> None:
    """Raises ModelError, which begins with `claim`, if names or shapes differ."""
    problems = [f"missing {name}" for name in own if name not in given]
    problems += [f"unexpected {name}" for name in given if name not in own]
    problems += [
        f"{name} has shape {given[name]}, expected {shape}"
        for name, shape in own.items()
        if name in given and given[name] != shape
    ]
    if problems:
        more = f" and {len(problems) - _MOST_NAMED} more" if len(problems) > _MOST_NAMED else ""
        raise ModelError(f"{claim}: {'; '.join(problems[:_MOST_NAMED])}{more}")


def require_floats(own: Mapping[str, Tensor], found: Mapping[str, torch.dtype], where: str = "") -> None:
    """Require floating point numbers of usual types where the model has some: integers and FP8 lack their scales.

    Raises ModelError, which begins with `where`.
    """
    for name, tensor in own.items():
        if tensor.is_floating_point() and name in found and found[name] not in _FLOATS:
            raise ModelError(
                f"{where}{name}: has values of {str(found[name]).removeprefix('torch.')}, expected floating point"
                " numbers of 16, 32 or 64 bits; quantized weights are not trained: bring them as they were before"
            )


def require_equal_ties(tied: Mapping[str, str], read: Callable[[str], Tensor | None], where: str = "") -> None:
    """Require equal values of the names that a model has one tensor for.

    Raises ModelError, which begins with `where`: one of the two would be lost.
    """
    for name, first in tied.items():
        one, other = read(name), read(first)
        if one is not None and other is not None and bool((one != other).any()):
            raise ModelError(
                f"{where}{name} is another tensor than {first}, but the configuration ties them"
                " (tie_word_embeddings: true); set it to false if the model has both"
            )


def require_finite(lm: Any, where: Callable[[str], str] = str) -> None:
    """Raises ModelError for a weight that is NaN or infinite; `where` says of a weight's name what it begins with."""
    for name, parameter in lm.named_parameters():
        require_finite_values(where(name), parameter.detach())


def require_finite_values(name: str, values: Tensor) -> None:
    """Raises ModelError, which begins with `name`, if a value is NaN or infinite."""
    if not values.numel() or all(bool(extreme.isfinite()) for extreme in values.aminmax()):
        return
    wrong = values.numel() - int(values.isfinite().sum())
    raise ModelError(
        f"{name}: {wrong:,} of {values.numel():,} weights are NaN or infinite: the training that they are from"
        " diverged, or the file is damaged; take an earlier checkpoint, or download it again"
    )
