"""The token-weighted average of what sites send, tensor by tensor, so that the server never holds it all.

It needs torch and safetensors only: weights are tensors with names.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open

_NAMED = 5  # of many tensors that are wrong
_NAME_LENGTH = 200  # characters
_SLICE = 1 << 16  # numbers that are summed at a time: what stays in a core's cache


@dataclass(frozen=True)
class _Contribution:
    """`tensors` may be NVFlare's references to tensors on the disk."""

    tensors: dict[str, Any]
    tokens: int


class TokenWeightedAverage:
    """Mean of the sites' tensors, each weighted by the answer tokens that the site trained on.

    Sums are in float64 and in the order of the sites' names, so that the mean does not depend on the order of
    arrival. Sums of one slice of one tensor exist at a time.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        """`shapes` are those of the global model; without them the first result says what all must have."""
        self._shapes = dict(shapes) if shapes else None
        self._sites: dict[str, _Contribution] = {}

    @property
    def sites(self) -> list[str]:
        return sorted(self._sites)

    def add(self, site: str, tensors: Mapping[str, Any], tokens: object, whole: bool = True) -> None:
        """Take one site's result; `whole` says whether it must have all tensors, else missing ones count as zero.

        Raises ValueError for a result without a positive number of tokens, or with tensors that are not the model's.
        """
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens <= 0:
            raise ValueError(f"{site}: expected the number of answer tokens it trained on, found {tokens!r}")
        shapes = shapes_of(tensors)
        if self._shapes is None:
            self._shapes = shapes
        if wrong := other_tensors(shapes, self._shapes, whole):
            raise ValueError(f"{site}: {wrong}")
        self._sites[site] = _Contribution(dict(tensors), tokens)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor's mean in float32; afterwards nothing is left. Raises what `mean` raises."""
        for name in dict.fromkeys(name for one in self._sites.values() for name in one.tensors):
            mean = self.mean(name)
            assert mean is not None
            yield name, mean
        self.clear()

    def mean(self, name: str) -> torch.Tensor | None:
        """One tensor's mean in float32, which is let go of; None for a tensor that no site has sent.

        Raises ValueError that names the sites whose tensor has a number that is not finite.
        """
        total = sum(one.tokens for one in self._sites.values())
        parts = {
            site: (_loaded(self._sites[site].tensors.pop(name)), self._sites[site].tokens)
            for site in sorted(self._sites)
            if name in self._sites[site].tensors
        }
        if not parts:
            return None
        mean = _mean(list(parts.values()), total)
        if not math.isfinite(mean.sum().item()):
            odd = [site for site, (tensor, _) in parts.items() if not torch.isfinite(tensor).all()]
            raise ValueError(f"{', '.join(odd) or 'all sites'}: {name} has numbers that are not finite")
        return mean

    def clear(self) -> None:
        """Let go of everything."""
        self._sites = {}


def shapes_of(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Without reading a tensor."""
    return {name: _shape(tensor) for name, tensor in tensors.items()}


def other_tensors(
    shapes: Mapping[str, tuple[int, ...]], of_model: Mapping[str, tuple[int, ...]], whole: bool
) -> str | None:
    """What is wrong with tensors that are not the model's; `whole` says whether all must be there."""
    missing = of_model.keys() - shapes.keys() if whole else set()
    odd = sorted({name for name, shape in shapes.items() if of_model.get(name) != shape} | missing)
    return f"tensors differ from those of the global model: {', '.join(map(plain, odd[:_NAMED]))}" if odd else None


def plain(name: str) -> str:
    """A tensor's name as it may stand in a line of text, whoever gave it."""
    return name if name.isprintable() and len(name) <= _NAME_LENGTH else repr(name)[:_NAME_LENGTH]


def norm_of(tensors: Mapping[str, Any]) -> float:
    """The Euclidean norm of all numbers together, of tensors that are read one after the other.

    Raises ValueError that names a tensor with a number that is not finite.
    """
    squares = 0.0
    for name, tensor in tensors.items():
        slices = _loaded(tensor).reshape(-1).split(_SLICE)
        of_tensor = math.fsum(piece.double().square().sum().item() for piece in slices)
        if not math.isfinite(of_tensor):
            raise ValueError(f"{name} has numbers that are not finite")
        squares += of_tensor
    return math.sqrt(squares)


def _mean(parts: list[tuple[torch.Tensor, int]], total: int) -> torch.Tensor:
    flat = [(tensor.reshape(-1), tokens) for tensor, tokens in parts]
    mean = torch.empty(flat[0][0].numel(), dtype=torch.float32)
    for first in range(0, mean.numel(), _SLICE):
        piece = slice(first, first + _SLICE)
        summed = torch.zeros(mean[piece].numel(), dtype=torch.float64)
        for tensor, tokens in flat:
            summed.add_(tensor[piece], alpha=tokens)
        mean[piece] = summed.div_(total)
    return mean.reshape(parts[0][0].shape)


def _loaded(tensor: Any) -> torch.Tensor:
    loaded: torch.Tensor = tensor if isinstance(tensor, torch.Tensor) else tensor.materialize()
    return loaded


def _shape(tensor: Any) -> tuple[int, ...]:
    if hasattr(tensor, "shape"):
        return tuple(tensor.shape)
    with safe_open(tensor.file_path, framework="pt") as file:  # without reading the tensor
        return tuple(file.get_slice(tensor.key).get_shape())
