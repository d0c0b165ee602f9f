"""The loss of a batch, computed in the fastest way that the model supports.

Each model is tried out: whether it takes packed records without padding, and whether its logits are the output
projection alone. If not, it is trained on padded batches, or through its own forward pass, with the same result.
Models that are not causal are refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from fedsft_assets.model.causality import require_causal
from fedsft_assets.model.training.batches import Batch, Tokens, pack, pad
from fedsft_assets.model.training.chunked_loss import (
    cross_entropies,
    head_input,
    head_loss,
    head_losses,
    head_only_at,
    summed_cross_entropy,
)
from fedsft_assets.model.training.packed_attention import packed_attention
from fedsft_assets.model.training.router_loss import gradient_of, router_coefficient
from fedsft_assets.model.trial import largest_window, long_ids, some_ids, undisturbed

_TRIED_LENGTHS = (5, 2, 9)
# Relative to the largest value. Rounding is below 1e-6; a token that sees another record differs by more than 1e-3.
_AGREEMENT = 1e-4
_COMPARED = 8  # tokens at the end of a record


class AnswerLoss(nn.Module):
    """The summed loss of batches under the Hugging Face model `lm`.

    It is a sum so that means over batches, micro-batches and devices can be weighted by tokens. `packs` says whether
    records are packed without padding, `plain_head` whether logits are the output projection alone; `router` is the
    coefficient of a mixture's router loss, 0 if that is not trained.
    """

    def __init__(self, lm: Any, pad_id: int, longest: int | None = None) -> None:
        """Try the model out. `longest` is the maximum number of tokens of a record; None is unlimited.

        Raises ModelError for a model that is not causal.
        """
        super().__init__()
        self.lm, self.pad_id = lm, pad_id
        self.router = router_coefficient(lm)
        require_causal(lm)
        with undisturbed(lm):
            self.plain_head = _has_plain_head(lm)
            self.packs = _packs(lm, longest)

    def batch(self, tokens: Sequence[Tokens], answer_only: bool = True) -> Batch:
        """The records as a batch for this model, packed or padded."""
        return pack(tokens, answer_only) if self.packs else pad(tokens, self.pad_id, answer_only)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Call `forward` only within the block; generate text only outside of it."""
        with packed_attention(self.lm) if self.packs else nullcontext():
            yield

    def forward(self, batch: Batch) -> Tensor:
        """The summed loss of a batch's targets in nats, an fp32 scalar.

        In training mode, its gradient includes that of the router loss for as many targets; its value does not.
        """
        inputs, head = _inputs(batch), self.lm.get_output_embeddings()
        if self.router and self.lm.training:
            return self._with_router(head, batch, inputs)
        if self.plain_head:
            hidden = self.lm.base_model(**inputs)[0].flatten(0, 1)
            return head_loss(hidden.index_select(0, batch.positions), head, batch.targets)
        return summed_cross_entropy(_logits_at(self.lm, inputs, batch.positions), batch.targets)

    @torch.no_grad()
    def of_each(self, batch: Batch) -> Tensor:
        """The loss of each of a batch's targets, in nats, fp32 [N]."""
        if self.plain_head:
            hidden = self.lm.base_model(**_inputs(batch))[0].flatten(0, 1)
            return head_losses(hidden.index_select(0, batch.positions), self.lm.get_output_embeddings(), batch.targets)
        return cross_entropies(_logits_at(self.lm, _inputs(batch), batch.positions), batch.targets)

    def _with_router(self, head: Any, batch: Batch, inputs: dict[str, Any]) -> Tensor:
        """The same through the model's own forward pass, which is needed for the router loss."""
        if self.plain_head:
            with head_input(head) as hidden:
                output = self.lm(**inputs, output_router_logits=True)
            loss = head_loss(hidden[0].flatten(0, 1).index_select(0, batch.positions), head, batch.targets)
        else:
            with head_only_at(head, batch.positions) as called:
                output = self.lm(**inputs, output_router_logits=True)
            logits = output.logits.flatten(0, 1)
            loss = summed_cross_entropy(logits if called else logits.index_select(0, batch.positions), batch.targets)
        return loss + gradient_of(output, self.router * len(batch.targets))


def _inputs(batch: Batch) -> dict[str, Any]:
    """A batch as the model's own arguments."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if batch.lengths is not None:
        return {**inputs, "position_ids": batch.position_ids, "record_lengths": batch.lengths}
    # Each record begins a row, so the model can count positions itself: RoBERTa does not begin at 0.
    return {**inputs, "attention_mask": batch.attention_mask}


def _logits_at(lm: Any, inputs: Mapping[str, Any], positions: Tensor) -> Tensor:
    """The model's logits [N, V] at `positions` [N] of its flattened inputs."""
    with head_only_at(lm.get_output_embeddings(), positions) as called:
        logits = lm(**inputs).logits.flatten(0, 1)
    return logits if called else logits.index_select(0, positions)


def _has_plain_head(lm: Any) -> bool:
    head = lm.get_output_embeddings()
    if type(head) is not nn.Linear or lm.base_model is lm:
        return False
    ids = some_ids(lm, max(_TRIED_LENGTHS))[None]
    # Soft caps hardly change small logits, such as those of random weights.
    enlarged = head.register_forward_hook(lambda _module, _args, logits: logits * 1e4)
    try:
        hidden = lm.base_model(input_ids=ids, use_cache=False)[0]
        if hidden.shape[-1] != head.in_features:
            return False
        plain = head(hidden)
        return _agree(lm(input_ids=ids, use_cache=False).logits, plain)
    finally:
        enlarged.remove()


def _packs(lm: Any, longest: int | None) -> bool:
    """Whether packed records give the same logits as each alone.

    If attention has a window or chunks that a record can exceed, one of the tried records does, and another one
    follows it: what a token sees must depend on its position in its record, not in the row.
    """
    if not lm._can_set_attn_implementation():
        return False
    records = [some_ids(lm, length) for length in _TRIED_LENGTHS]
    if not _agree_when_packed(lm, records):
        return False
    window = largest_window(lm.config, longest)
    return window is None or _agree_when_packed(lm, [records[0], long_ids(lm, window), records[-1]])


def _agree_when_packed(lm: Any, records: list[Tensor]) -> bool:
    lengths = [len(ids) for ids in records]
    ends = [torch.arange(max(0, length - _COMPARED), length, device=records[0].device) for length in lengths]
    starts = [0, *accumulate(lengths)]
    row = {
        "input_ids": torch.cat(records)[None],
        "position_ids": torch.cat([torch.arange(length, device=records[0].device) for length in lengths])[None],
        "use_cache": False,
        "record_lengths": lengths,
    }
    try:
        alone = [
            _logits_at(lm, {"input_ids": ids[None], "use_cache": False}, end)
            for ids, end in zip(records, ends, strict=True)
        ]
        with packed_attention(lm):
            together = _logits_at(lm, row, torch.cat([end + start for end, start in zip(ends, starts, strict=False)]))
    except (TypeError, ValueError, RuntimeError):
        return False  # an unknown argument, or an unexpected shape
    return _agree(together, torch.cat(alone))


def _agree(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= _AGREEMENT * other.abs().max())
