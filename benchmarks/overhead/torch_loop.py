"""What a site does where there is no fedsft: a tutorial's training loop around a Hugging Face model.

It needs torch and transformers alone; the plain process, Flower's client and NVFlare's client script call it.
"""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from benchmarks.overhead.input import Input, Rows, SiteInput
from benchmarks.overhead.notes import Scored, Trained, note

_NO_LOSS = -100


class Loop:
    """A model that is trained on one site's records and scored on the common ones."""

    def __init__(self, given: Input) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(given.hugging_face, dtype=torch.float32)
        self._batch_size, self._validation = given.part.batch_size, given.validation()

    def weights(self) -> dict[str, Tensor]:
        """The model's state, not copied."""
        state: dict[str, Tensor] = self.model.state_dict()
        return state

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Take over weights as `weights` gives them."""
        self.model.load_state_dict(weights)

    def train(self, site: SiteInput, round: int) -> int:
        """All steps of a round (0-based); how many answer tokens they had."""
        self.model.train()
        optimizer = torch.optim.AdamW(self.model.parameters(), weight_decay=0.0)
        tokens, begun = 0, time.time()
        for indices, rate in zip(site.batches[round], site.rates[round], strict=True):
            optimizer.param_groups[0]["lr"] = rate
            loss = self.model(**_batch(site.rows, indices)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            tokens += sum(map(site.rows.answers, indices))
        note(Trained(site.site, round, len(site.batches[round]), tokens, begun, time.time()))
        return tokens

    def validate(self, site: str, round: int) -> float:
        """The mean loss by answer token of the model as it is, which is the global one after so many rounds."""
        self.model.eval()
        total, tokens = 0.0, 0
        records = range(len(self._validation.ids))
        with torch.no_grad():
            for start in records[:: self._batch_size]:
                indices = records[start : start + self._batch_size]
                answers = sum(map(self._validation.answers, indices))
                total += self.model(**_batch(self._validation, indices)).loss.item() * answers
                tokens += answers
        note(Scored(site, round, total / tokens, tokens))
        return total / tokens


def _batch(rows: Rows, indices: Sequence[int]) -> dict[str, Tensor]:
    """Records padded to the longest of them, with labels at their answers only: [B, T] each."""
    ids = [torch.tensor(rows.ids[index]) for index in indices]
    labels = [one.clone() for one in ids]
    for one, index in zip(labels, indices, strict=True):
        one[: rows.prompts[index]] = _NO_LOSS
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=_NO_LOSS),
    }
