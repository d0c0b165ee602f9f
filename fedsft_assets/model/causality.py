"""Check that a model is causal: later tokens must not change earlier predictions.

Transformers also offers encoders (BERT, RoBERTa, ELECTRA) as causal language models. They see the tokens that they
should predict, so their loss falls to zero and they learn nothing.
"""

from typing import Any

import torch
from torch import Tensor

from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.trial import at_most, some_ids, undisturbed

_LENGTH = 24
# Relative to the largest logit. Causal models differ by less than 1e-6, encoders with random weights by 1e-4.
_TOLERANCE = 1e-5


def require_causal(lm: Any) -> None:
    """Raise ModelError if changing later tokens of a row changes the logits before them."""
    ids = _plain_ids(lm)
    # If a model looks ahead within blocks, at most one of two adjacent cuts is at a block boundary.
    cuts = (len(ids) - 1, len(ids) - 2, len(ids) // 2)
    rows = ids.repeat(1 + len(cuts), 1)
    for row, cut in zip(rows[1:], cuts, strict=True):
        row[cut:] = _others(lm, row[cut:])
    with undisturbed(lm):
        logits = lm(input_ids=rows, use_cache=False).logits.float()
    largest = logits.abs().max()
    for changed, cut in zip(logits[1:], cuts, strict=True):
        difference = (changed[:cut] - logits[0, :cut]).abs().max()
        if difference > _TOLERANCE * largest:
            raise ModelError(
                f"{type(lm).__name__} ({lm.config.model_type}) is not a causal language model: changing tokens from"
                f" {cut} on changed logits before them by up to {difference / largest:.0e} of the largest, so it"
                f" sees the answers that it should predict; use a model that was trained to predict the next token"
                f"{_advice(lm.config)}"
            )


def _plain_ids(lm: Any) -> Tensor:
    """Token ids without padding tokens, which some models ignore."""
    ids = some_ids(lm, at_most(lm, _LENGTH))
    return torch.where(ids == _padding(lm), _others(lm, ids), ids)


def _others(lm: Any, ids: Tensor) -> Tensor:
    vocabulary = lm.get_input_embeddings().num_embeddings
    others = (ids + vocabulary // 2) % vocabulary
    return torch.where(others == _padding(lm), (others + 1) % vocabulary, others)


def _padding(lm: Any) -> int:
    padding = getattr(lm.config.get_text_config(), "pad_token_id", None)
    return -1 if padding is None else padding


def _advice(config: Any) -> str:
    if getattr(config, "is_decoder", True):
        return ""
    return ", or, if this one was, set is_decoder to true in its config.json"
