"""Attention within records that are packed into one row, without padding or mask.

A record's tokens see exactly what they would see alone. All other operations of a model are per token, so a packed
row costs exactly what its tokens cost.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

_NAME = "fedsft_packed"

# Arguments that packed attention does not support; models that use them are not packed.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache")


class CannotPackError(RuntimeError):
    """The model needs an attention feature that packed attention does not support."""


@contextmanager
def packed_attention(lm: Any) -> Iterator[None]:
    """Within the block, the Hugging Face model `lm` takes packed records [1, N] and `record_lengths` with the sum N.

    The model's layers pass the lengths on to its attention as a keyword argument.
    """
    before = lm.config._attn_implementation
    lm.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        lm.set_attn_implementation(before)


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    record_lengths: list[int] | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as an `AttentionInterface`: `query` [1, H, N, D], `key`, `value` [1, H or fewer, N, D] to [1, N, H, D].

    Raises CannotPackError for unsupported arguments.
    """
    unsupported = [name for name in _UNSUPPORTED if others.get(name) is not None]
    if record_lengths is None or attention_mask is not None or unsupported or not getattr(module, "is_causal", True):
        raise CannotPackError(f"{type(module).__name__} needs more than causal attention within packed records")
    grouped = {"enable_gqa": True} if key.shape[1] != query.shape[1] else {}
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not dropout and not sliding_window:
        return _attend_in_one_kernel(query, key, value, scaling, record_lengths), None
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, **grouped}
    parts = [
        scaled_dot_product_attention(q, k, v, **_causal_mask(q, sliding_window), **options)
        for q, k, v in zip(*(tensor.split(record_lengths, 2) for tensor in (query, key, value)), strict=True)
    ]
    return torch.cat([part.transpose(1, 2) for part in parts], 1), None


def _causal_mask(query: Tensor, window: int | None) -> dict[str, Any]:
    """Arguments for causal attention to all earlier tokens, or to the last `window` tokens including the own one."""
    length = query.shape[2]
    if window is None or length <= window:
        return {"is_causal": True}
    position = torch.arange(length, device=query.device)
    own = position[:, None]
    return {"attn_mask": (position <= own) & (position > own - window)}


def _attend_in_one_kernel(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, lengths: list[int]
) -> Tensor:
    """Attention within all records at once, with PyTorch's variable-length flash attention for GPUs."""
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, *lengths], device=query.device, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    longest, grouped = max(lengths), key.shape[1] != query.shape[1]
    causal = (-1, 0)  # all earlier tokens, no later ones
    out = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=causal, scale=scaling, enable_gqa=grouped)
    assert isinstance(out, Tensor)
    return out[None]


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, lambda *_args, **_kwargs: None)
