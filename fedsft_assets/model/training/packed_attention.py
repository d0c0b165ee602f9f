"""Attention within records that lie one after another in one row, without padding and without a mask.

What a record's tokens see is what they would see alone. All other work of a model is done token by
token, so a row of records costs exactly what its tokens cost.
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

# What the packed attention leaves out changes a model's result: such a model is not packed.
_UNKNOWN = ("softcap", "s_aux", "position_bias", "cache")


class CannotPackError(RuntimeError):
    """The model's attention does something that packed attention does not do."""


@contextmanager
def packed_attention(lm: Any) -> Iterator[None]:
    """Within the block, the Hugging Face model `lm` takes rows of records [1, N] and `record_lengths` that add up to N.

    The lengths go as a keyword argument through the model's layers to its attention.
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
    """As `AttentionInterface` wants it: `query` [1, H, N, D], `key` and `value` [1, H or fewer, N, D] to [1, N, H, D].

    Raises CannotPackError for what it does not know.
    """
    unknown = [name for name in _UNKNOWN if others.get(name) is not None]
    if record_lengths is None or attention_mask is not None or unknown or not getattr(module, "is_causal", True):
        raise CannotPackError(f"{type(module).__name__} asks for more than packed attention within known records")
    grouped = {"enable_gqa": True} if key.shape[1] != query.shape[1] else {}
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and not dropout and not sliding_window:
        return _attend_in_one_kernel(query, key, value, scaling, record_lengths), None
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, **grouped}
    parts = [
        scaled_dot_product_attention(q, k, v, **_sight(q, sliding_window), **options)
        for q, k, v in zip(*(tensor.split(record_lengths, 2) for tensor in (query, key, value)), strict=True)
    ]
    return torch.cat([part.transpose(1, 2) for part in parts], 1), None


def _sight(query: Tensor, window: int | None) -> dict[str, Any]:
    """What a token sees: all before it, or the last `window` tokens, itself among them."""
    length = query.shape[2]
    if window is None or length <= window:
        return {"is_causal": True}
    position = torch.arange(length, device=query.device)
    own = position[:, None]
    return {"attn_mask": (position <= own) & (position > own - window)}


def _attend_in_one_kernel(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, lengths: list[int]
) -> Tensor:
    """All records at once, by the flash attention for sequences of various lengths that PyTorch brings for GPUs."""
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, *lengths], device=query.device, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    longest, grouped = max(lengths), key.shape[1] != query.shape[1]
    causal = (-1, 0)  # any token before, none after
    out = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=causal, scale=scaling, enable_gqa=grouped)
    assert isinstance(out, Tensor)
    return out[None]


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, lambda *_args, **_kwargs: None)
