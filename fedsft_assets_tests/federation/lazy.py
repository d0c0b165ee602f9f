"""Tensors that are computed when they are sent, as their receiver has them."""

import torch

from fedsft_assets.federation.transport import LazyTensor


def materialize(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its elements in memory; only a `LazyTensor` is changed."""
    return tensor.make(0, tensor.numel()).reshape(tensor.shape) if isinstance(tensor, LazyTensor) else tensor
