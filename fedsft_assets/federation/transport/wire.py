"""The wire precision of weights."""

import torch

from fedsft_assets.federation.protocol.messages import Wire


def rounded(change: torch.Tensor, wire: Wire) -> torch.Tensor:
    """Round a change to the wire precision; integer and boolean tensors are unchanged."""
    return change.to(torch.bfloat16) if wire == Wire.BF16_DIFF and change.is_floating_point() else change
