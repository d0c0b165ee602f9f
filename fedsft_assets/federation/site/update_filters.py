"""Filters applied to a site's change before it leaves the site."""

import math
import re
from collections.abc import Iterable

import torch

from fedsft_assets.federation.site.noise import add_noise
from fedsft_assets.specs.job import FiltersSpec

_MARGIN = 1e-9  # relative: far above float64's rounding error in a sum of squares
_AT_ONCE = 1 << 20


class ChangeFilter:
    """The filters of one site."""

    def __init__(self, spec: FiltersSpec) -> None:
        self._excluded = [re.compile(pattern) for pattern in spec.exclude]
        self._privacy = spec.privacy

    @property
    def needs_all(self) -> bool:
        """Whether `privatized` applies, which needs all tensors at once."""
        return self._privacy is not None

    def keeps(self, name: str) -> bool:
        """Whether a tensor may leave the site."""
        return not any(pattern.search(name) for pattern in self._excluded)

    def privatized(self, changes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Clip the changes in place to the joint L2 norm `clip`, and add Gaussian noise to each element.

        Raises ValueError for integer tensors, on which noise is meaningless, and for non-finite values, which cannot be
        clipped.
        """
        if self._privacy is None:
            return changes
        odd = [name for name, change in changes.items() if not change.is_floating_point()]
        if odd:
            raise ValueError(f"filters.privacy: {odd[0]} is not a floating-point tensor; add it to filters.exclude")
        whole = {name: change.contiguous() for name, change in changes.items()}
        norm = _norm(whole.values())
        if not math.isfinite(norm):
            numbers = sum(map(torch.numel, whole.values()))
            cause = self._privacy.remedy(numbers, "in training; try a lower learning rate")
            raise ValueError(
                "filters.privacy: this site's change has non-finite values and cannot be clipped, so nothing was"
                f" sent: it diverged {cause}"
            )
        clip = self._privacy.clip * (1 - _MARGIN)
        add_noise(whole.values(), min(1.0, clip / norm) if norm else 1.0, self._privacy.deviation)
        return whole


def _norm(tensors: Iterable[torch.Tensor]) -> float:
    """Joint L2 norm of all tensors, summed in float64."""
    return math.sqrt(
        math.fsum(
            part.to(torch.float64).square().sum().item()
            for tensor in tensors
            for part in tensor.view(-1).split(_AT_ONCE)
        )
    )
