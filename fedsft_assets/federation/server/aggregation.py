"""Token-weighted averaging of site updates, one tensor at a time, so that the server never holds all of them in memory.

Requires torch and safetensors only: weights are named tensors.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open

_NAMED = 5  # mismatched tensors named in an error
_NAME_LENGTH = 200  # characters
_SLICE = 1 << 16  # elements summed at a time: fits in a core's cache


@dataclass(frozen=True)
class _Contribution:
    """`tensors` may hold NVFlare's references to tensors on disk."""

    tensors: dict[str, Any]
    tokens: int


class TokenWeightedAverage:
    """Mean of the sites' tensors, weighted by the number of answer tokens each site trained on.

    Sums are computed in float64, in the order of the sites' names, so the mean does not depend on the order of arrival.
    Only one slice of one tensor is summed at a time.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]] | None = None) -> None:
        """`shapes` are the tensor shapes of the global model; if omitted, the first result defines them."""
        self._shapes = dict(shapes) if shapes else None
        self._sites: dict[str, _Contribution] = {}

    @property
    def sites(self) -> list[str]:
        return sorted(self._sites)

    def add(self, site: str, tensors: Mapping[str, Any], tokens: object, whole: bool = True) -> None:
        """Add one site's result. If `whole`, it must contain every tensor; otherwise missing tensors count as zero.

        Raises ValueError if `tokens` is not a positive integer or the tensors do not match the model.
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
        """Yield the mean of each tensor in float32, releasing its inputs. Raises ValueError as `mean` does."""
        for name in dict.fromkeys(name for one in self._sites.values() for name in one.tensors):
            mean = self.mean(name)
            assert mean is not None
            yield name, mean
        self.clear()

    def mean(self, name: str) -> torch.Tensor | None:
        """Mean of one tensor in float32, releasing its inputs; None if no site sent the tensor.

        Raises ValueError naming the sites whose tensor has non-finite values.
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
            raise ValueError(f"{', '.join(odd) or 'all sites'}: {name} has non-finite values")
        return mean

    def clear(self) -> None:
        """Release all results."""
        self._sites = {}


def shapes_of(tensors: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor, without loading any."""
    return {name: _shape(tensor) for name, tensor in tensors.items()}


def other_tensors(
    shapes: Mapping[str, tuple[int, ...]], of_model: Mapping[str, tuple[int, ...]], whole: bool
) -> str | None:
    """Describe a mismatch with the model's tensors, or return None; `whole` requires every tensor to be present."""
    missing = of_model.keys() - shapes.keys() if whole else set()
    odd = sorted({name for name, shape in shapes.items() if of_model.get(name) != shape} | missing)
    return f"tensors differ from those of the global model: {', '.join(map(plain, odd[:_NAMED]))}" if odd else None


def plain(name: str) -> str:
    """A tensor name made safe for logs and messages: it may come from an untrusted site."""
    return name if name.isprintable() and len(name) <= _NAME_LENGTH else repr(name)[:_NAME_LENGTH]


def norm_of(tensors: Mapping[str, Any]) -> float:
    """L2 norm over all tensors together, loading one tensor at a time.

    Raises ValueError naming a tensor with non-finite values.
    """
    squares = 0.0
    for name, tensor in tensors.items():
        slices = _loaded(tensor).reshape(-1).split(_SLICE)
        of_tensor = math.fsum(piece.double().square().sum().item() for piece in slices)
        if not math.isfinite(of_tensor):
            raise ValueError(f"{name} has non-finite values")
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
    with safe_open(tensor.file_path, framework="pt") as file:  # reads the header only
        return tuple(file.get_slice(tensor.key).get_shape())
