"""Records to tokens to batches: prompt template, answer-only labels, length-sorted batches.

Relation to NeMo's GPTSFTDataset: the same records (`input`, `output`), the same kind of template, the
space before `{output}` tokenized with the answer, EOS appended and learned, loss on the answer only,
the context given up before the answer. Different: the context loses its beginning (NeMo's default
drops its end), an answer that is cut gets no EOS because it does not end there, and a special token
spelled out in a record stays plain text, so that data cannot end an answer.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedsft_assets.data.records import Record
from fedsft_assets.model.prompt_template import DEFAULT_TEMPLATE, template

IGNORED = -100
_BATCHES_IN_A_BUCKET = 32


@dataclass(frozen=True, slots=True)
class Tokens:
    """One record: `ids` are the prompt's and then the answer's, `prompt` says how many are the prompt's."""

    ids: list[int]
    prompt: int
    context_cut: bool = False
    answer_cut: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def answer(self) -> int:
        """Tokens that have a loss, EOS among them."""
        return len(self.ids) - self.prompt


class Truncated(NamedTuple):
    """How many records lost a part of their context, and how many a part of their answer."""

    contexts: int
    answers: int


class Batch(NamedTuple):
    """Right-padded records, each tensor int64 [B, T]; `labels` are IGNORED outside answers.

    Labels stand where their tokens stand, as in Hugging Face; the shift by one is the loss's work.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


def tokenize(
    records: Iterable[Record], tokenizer: Any, max_length: int, prompt_template: str = DEFAULT_TEMPLATE
) -> list[Tokens]:
    """Tokens of records, in their order, none longer than `max_length`.

    The prompt loses its beginning first (never the BOS token, never its last token); the answer
    loses its end, EOS included, only if it does not fit even then. `truncated` counts both.
    """
    records = list(records)
    if not records:
        return []
    style = template(prompt_template)
    bos = prompt_prefix(tokenizer)
    prompts = encode(tokenizer, [style.prompt(record["input"]) for record in records])
    answers = encode(tokenizer, [style.answer(record["output"]) for record in records])
    longest_answer = max_length - len(bos) - 1
    tokens = []
    for prompt, text in zip(prompts, answers, strict=True):
        answer = [*text, tokenizer.eos_token_id]
        kept_answer = answer[:longest_answer]
        room = max_length - len(bos) - len(kept_answer)
        kept = prompt[-room:]
        tokens.append(
            Tokens(
                ids=[*bos, *kept, *kept_answer],
                prompt=len(bos) + len(kept),
                context_cut=len(kept) < len(prompt),
                answer_cut=len(kept_answer) < len(answer),
            )
        )
    return tokens


def truncated(tokens: Iterable[Tokens]) -> Truncated:
    """Counts of what `tokenize` had to cut."""
    tokens = list(tokens)
    return Truncated(sum(one.context_cut for one in tokens), sum(one.answer_cut for one in tokens))


def encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of plain texts: nothing is added, and no text becomes a special token."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def prompt_prefix(tokenizer: Any) -> list[int]:
    """The BOS token if the tokenizer puts one before a text, else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][0] == bos else []


def training_batches(tokens: Sequence[Tokens], batch_size: int, seed: int | str, epoch: int) -> list[list[int]]:
    """Indices of all records once, in batches: a function of the lengths, the seed and the epoch only.

    Records are shuffled, sorted by length within buckets of 32 batches, and the batches shuffled
    again: little padding, and no order by length over the epoch. Only the last batch may be short.
    """
    order = list(range(len(tokens)))
    rng = random.Random(f"{seed}/{epoch}")
    rng.shuffle(order)
    full = len(order) - len(order) % batch_size
    bucket = batch_size * _BATCHES_IN_A_BUCKET
    batches: list[list[int]] = []
    for start in range(0, full, bucket):
        records = sorted(order[start : min(start + bucket, full)], key=lambda index: len(tokens[index]))
        batches.extend(_cut(records, batch_size))
    rng.shuffle(batches)
    return batches + ([order[full:]] if full < len(order) else [])


def evaluation_batches(tokens: Sequence[Tokens], batch_size: int) -> list[list[int]]:
    """Indices of all records once, in batches sorted by length, shortest first."""
    return _cut(sorted(range(len(tokens)), key=lambda index: len(tokens[index])), batch_size)


def collate(tokens: Sequence[Tokens], pad: int) -> Batch:
    """One batch, padded on the right to its longest record. `pad` is never learned nor attended to."""
    length = max(len(one) for one in tokens)
    ids = [one.ids + [pad] * (length - len(one)) for one in tokens]
    mask = [[1] * len(one) + [0] * (length - len(one)) for one in tokens]
    labels = [[IGNORED] * one.prompt + one.ids[one.prompt :] + [IGNORED] * (length - len(one)) for one in tokens]
    return Batch(torch.tensor(ids), torch.tensor(mask), torch.tensor(labels))


def _cut(records: list[int], size: int) -> list[list[int]]:
    return [records[start : start + size] for start in range(0, len(records), size)]
