"""From a batch to its loss, in the fastest way that the model at hand allows.

Two things are tried out on each model rather than believed: whether it can be given rows of records
without padding, and whether its logits are nothing but its output projection. A model that fails is
trained on padded batches, or through its own forward pass, with the same result.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fedsft_assets.model.attention import packed_attention
from fedsft_assets.model.batches import Batch, Tokens, pack, pad
from fedsft_assets.model.loss import head_loss, head_only_at, summed_cross_entropy

_TRIED_LENGTHS = (5, 2, 9)
_AGREEMENT = 1e-3  # of the largest value; a token that sees another record differs by far more


class AnswerLoss(nn.Module):
    """The summed loss of batches under the Hugging Face model `lm`.

    A sum, so that the means over batches, micro-batches and devices can be weighted by tokens. `packs` says
    whether batches are rows without padding, `plain_head` whether logits are the output projection alone.
    """

    def __init__(self, lm: Any, pad_id: int) -> None:
        super().__init__()
        self.lm, self.pad_id = lm, pad_id
        with _undisturbed(lm):
            self.plain_head = _has_plain_head(lm)
            self.packs = _packs(lm)

    def batch(self, tokens: Sequence[Tokens], answer_only: bool = True) -> Batch:
        """Records as this model takes them."""
        return pack(tokens, answer_only) if self.packs else pad(tokens, self.pad_id, answer_only)

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Batches go in only within the block; generation works only outside of it."""
        with packed_attention(self.lm) if self.packs else nullcontext():
            yield

    def forward(self, batch: Batch) -> Tensor:
        """The sum of the losses of a batch's targets, in nats; a scalar in fp32."""
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
        if batch.lengths is not None:
            inputs["record_lengths"] = batch.lengths
        else:
            inputs["attention_mask"] = batch.attention_mask
        head = self.lm.get_output_embeddings()
        if self.plain_head:
            hidden = self.lm.base_model(**inputs)[0].flatten(0, 1)
            return head_loss(hidden.index_select(0, batch.positions), head, batch.targets)
        with head_only_at(head, batch.positions) as called:
            logits = self.lm(**inputs).logits.flatten(0, 1)
        if not called:
            logits = logits.index_select(0, batch.positions)
        return summed_cross_entropy(logits, batch.targets)


@contextmanager
def _undisturbed(lm: Any) -> Iterator[None]:
    """For a trial: no dropout, no gradients, and the random state afterwards as before."""
    training = lm.training
    lm.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng():
            yield
    finally:
        lm.train(training)


def _has_plain_head(lm: Any) -> bool:
    head = lm.get_output_embeddings()
    if type(head) is not nn.Linear or lm.base_model is lm:
        return False
    ids = _some_ids(lm, max(_TRIED_LENGTHS))[None]
    # Soft caps leave small logits as they are, and those of random weights are small.
    enlarged = head.register_forward_hook(lambda _module, _args, logits: logits * 1e4)
    try:
        plain = head(lm.base_model(input_ids=ids, use_cache=False)[0])
        return _agree(lm(input_ids=ids, use_cache=False).logits, plain)
    finally:
        enlarged.remove()


def _packs(lm: Any) -> bool:
    if not lm._can_set_attn_implementation():
        return False
    records = [_some_ids(lm, length) for length in _TRIED_LENGTHS]
    try:
        alone = torch.cat([lm(input_ids=ids[None], use_cache=False).logits[0] for ids in records])
        with packed_attention(lm):
            row = lm(
                input_ids=torch.cat(records)[None],
                position_ids=torch.cat([torch.arange(len(ids), device=ids.device) for ids in records])[None],
                use_cache=False,
                record_lengths=list(_TRIED_LENGTHS),
            ).logits[0]
    except (TypeError, ValueError, RuntimeError):
        return False  # an argument that it does not know, or a shape that it does not expect
    return _agree(row, alone)


def _some_ids(lm: Any, count: int) -> Tensor:
    """Token ids of all over the vocabulary, other ones for each count."""
    embeddings = lm.get_input_embeddings()
    return (torch.arange(count, device=embeddings.weight.device) * 7919 + count) % embeddings.num_embeddings


def _agree(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= _AGREEMENT * other.abs().max())
