"""The precision in which weights travel."""

import torch

from fedsft_assets.federation.protocol.messages import Wire


def rounded(change: torch.Tensor, wire: Wire) -> torch.Tensor:
    """A change in the precision of the wire; a tensor of integers or booleans stays as it is."""
    return change.to(torch.bfloat16) if wire == Wire.BF16_DIFF and change.is_floating_point() else change
