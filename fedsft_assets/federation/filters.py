"""What is done to a site's change before it leaves the site."""

import math
import re
import secrets

import torch

from fedsft_assets.specs import FiltersSpec


class ChangeFilter:
    """The filters of one site."""

    def __init__(self, spec: FiltersSpec) -> None:
        self._excluded = [re.compile(pattern) for pattern in spec.exclude]
        self._privacy = spec.privacy
        # Unlike all other randomness of a job this must not be known to anybody, so it has no seed.
        self._random = torch.Generator().manual_seed(secrets.randbits(63))

    @property
    def needs_all(self) -> bool:
        """Whether `privatized` does anything, for which it must be given all tensors at once."""
        return self._privacy is not None

    def keeps(self, name: str) -> bool:
        """Whether a tensor may leave the site."""
        return not any(pattern.search(name) for pattern in self._excluded)

    def privatized(self, changes: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The changes in place: clipped as one vector to the L2 norm `clip`, with Gaussian noise on each number.

        Raises ValueError for a tensor that is not of floats: noise on it would say nothing.
        """
        if self._privacy is None:
            return changes
        odd = [name for name, change in changes.items() if not change.is_floating_point()]
        if odd:
            raise ValueError(f"filters.privacy: {odd[0]} is not of floats; name it in filters.exclude")
        norm = math.sqrt(sum(change.to(torch.float64).square().sum().item() for change in changes.values()))
        clip = self._privacy.clip
        for change in changes.values():
            if norm > clip:
                change.mul_(clip / norm)
            noise = torch.empty_like(change).normal_(generator=self._random)
            change.add_(noise, alpha=self._privacy.noise_multiplier * clip)
        return changes
