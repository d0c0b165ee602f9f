"""In which numbers weights travel."""

import torch

from fedsft_assets.federation.protocol.messages import Wire


def rounded(change: torch.Tensor, wire: Wire) -> torch.Tensor:
    """A change as it travels. What is not of floats stays as it is."""
    return change.to(torch.bfloat16) if wire == Wire.BF16_DIFF and change.is_floating_point() else change
