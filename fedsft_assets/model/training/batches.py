"""From records to tokens to batches: prompt template, answer-only targets, shuffling, micro-batches.

As in NeMo's GPTSFTDataset: records (`input`, `output`), the kind of template, the space before `{output}`
tokenized with the answer, EOS appended and learned, loss on the answer only, context truncated before the
answer. Different: prompt and answer are tokenized as one text, the context is truncated at the beginning
(NeMo's default is the end), a truncated answer gets no EOS because it does not end there, and special tokens
spelled out in a record stay plain text, so that data cannot end an answer.
"""

import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedsft_assets.data.records import Record
from fedsft_assets.model.prompt_template import DEFAULT_TEMPLATE, template
from fedsft_assets.model.tokenizer.encode import TextEncoder

# Padded records are sorted by length within a window of so many batches. Larger windows make records of a batch more
# alike, so that a step learns less. With four, a tenth of a batch is padding; without sorting, a third.
_BATCHES_IN_A_WINDOW = 4


@dataclass(frozen=True, slots=True)
class Tokens:
    """One record: `ids` of the prompt and then the answer; `prompt` is the number of the former."""

    ids: list[int]
    prompt: int
    context_cut: bool = False
    answer_cut: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    def first_target(self, answer_only: bool = True) -> int:
        """The index of the first token with a loss: that of the answer, or 1, since nothing predicts token 0."""
        return max(self.prompt, 1) if answer_only else 1

    def targets(self, answer_only: bool = True) -> int:
        """The number of tokens with a loss, including EOS."""
        return len(self.ids) - self.first_target(answer_only)


class Truncated(NamedTuple):
    """The numbers of records with a truncated context, and with a truncated answer."""

    contexts: int
    answers: int


class Batch(NamedTuple):
    """Records for one forward pass, packed into a row without padding, with their `lengths`, or padded on the right.

    `input_ids` and `position_ids` are int64, packed [1, sum(lengths)], or padded [B, T] with `attention_mask` [B, T].
    `positions` [N] index the flattened inputs that predict a token with a loss, `targets` [N] are these tokens.
    The last token of a record predicts nothing and is not an input.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor | None
    lengths: list[int] | None
    positions: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "Batch":
        mask = self.attention_mask
        return Batch(
            self.input_ids.to(device),
            self.position_ids.to(device),
            None if mask is None else mask.to(device),
            self.lengths,
            self.positions.to(device),
            self.targets.to(device),
        )


def tokenize(
    records: Iterable[Record], tokenizer: Any, max_length: int, prompt_template: str = DEFAULT_TEMPLATE
) -> list[Tokens]:
    """Tokenize records, in order, each truncated to `max_length` tokens.

    The prompt is truncated first, at its beginning, keeping BOS and its last token; the answer is truncated at its
    end, including EOS, only if it still does not fit. `truncated` counts both.
    """
    records, style, encoder = list(records), template(prompt_template), TextEncoder.of(tokenizer)
    prompts = [style.prompt(record["input"]) for record in records]
    answers = [style.answer(record["output"]) for record in records]
    return [
        cut(ids[:prompt], ids[prompt:], max_length, encoder.front, tokenizer.eos_token_id)
        for ids, prompt in encoder.records(prompts, answers)
    ]


def cut(prompt: list[int], answer: list[int], max_length: int, front: Sequence[int], eos: int) -> Tokens:
    """Truncate one record to `max_length` tokens, including `front` (such as BOS) before it and `eos` at the end.

    Raises ValueError if there is no room for `front` and one token of the prompt.
    """
    longest_answer = max_length - len(front) - 1
    if longest_answer < 0:
        raise ValueError(f"max_length is {max_length}; expected room for BOS and one token of the prompt")
    answer = [*answer, eos]
    kept_answer = answer[:longest_answer]
    kept = prompt[-(max_length - len(front) - len(kept_answer)) :]
    return Tokens(
        ids=[*front, *kept, *kept_answer],
        prompt=len(front) + len(kept),
        context_cut=len(kept) < len(prompt),
        answer_cut=len(kept_answer) < len(answer),
    )


def truncated(tokens: Iterable[Tokens]) -> Truncated:
    """Count the truncated contexts and answers."""
    tokens = list(tokens)
    return Truncated(sum(one.context_cut for one in tokens), sum(one.answer_cut for one in tokens))


def training_batches(
    tokens: Sequence[Tokens], batch_size: int, seed: int | str, epoch: int, packed: bool
) -> list[list[int]]:
    """Indices of all records, each once, in batches; depends only on the arguments and the records' lengths.

    Records are shuffled. If not `packed`, they are then sorted by length within windows of a few batches, and the
    batches shuffled again: this reduces padding without ordering the epoch by length. Only the last batch may be short.
    """
    order = list(range(len(tokens)))
    rng = random.Random(f"{seed}/{epoch}")
    rng.shuffle(order)
    full = len(order) - len(order) % batch_size
    if packed:
        batches = _chunks(order[:full], batch_size)
    else:
        windows = _chunks(order[:full], batch_size * _BATCHES_IN_A_WINDOW)
        by_length = [sorted(window, key=lambda index: len(tokens[index])) for window in windows]
        batches = [batch for window in by_length for batch in _chunks(window, batch_size)]
        rng.shuffle(batches)
    return batches + ([order[full:]] if full < len(order) else [])


def evaluation_batches(tokens: Sequence[Tokens], batch_size: int) -> list[list[int]]:
    """Indices of all records, each once, in batches sorted by length, shortest first."""
    return _chunks(sorted(range(len(tokens)), key=lambda index: len(tokens[index])), batch_size)


def micro_batches(
    tokens: Sequence[Tokens], indices: Sequence[int], max_records: int | None, max_tokens: int | None, packed: bool
) -> list[list[int]]:
    """Split a batch into micro-batches of records with similar lengths.

    Each has at most `max_records` records and `max_tokens` tokens, including padding if not `packed`; a longer record
    is a micro-batch by itself. None is unlimited. A batch that needs no split keeps its order.
    """
    if not indices:
        return []
    max_records, max_tokens = max_records or len(indices), max_tokens or sys.maxsize
    if len(indices) <= max_records and _padded_size([len(tokens[index]) for index in indices], packed) <= max_tokens:
        return [list(indices)]
    parts: list[list[int]] = []
    lengths: list[int] = []
    for index in sorted(indices, key=lambda index: len(tokens[index])):
        lengths.append(len(tokens[index]))
        if not parts or len(lengths) > max_records or _padded_size(lengths, packed) > max_tokens:
            parts.append([])
            lengths = lengths[-1:]
        parts[-1].append(index)
    return parts


def pack(tokens: Sequence[Tokens], answer_only: bool = True) -> Batch:
    """Pack records into one row. The loss is on their answers, or on all tokens but each record's first."""
    lengths = [len(one) - 1 for one in tokens]
    starts = [0, *accumulate(lengths)]
    positions = [
        torch.arange(start + one.first_target(answer_only) - 1, start + length)
        for start, length, one in zip(starts, lengths, tokens, strict=False)
    ]
    return Batch(
        input_ids=torch.tensor([id for one in tokens for id in one.ids[:-1]])[None],
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        attention_mask=None,
        lengths=lengths,
        positions=torch.cat(positions),
        targets=_targets(tokens, answer_only),
    )


def pad(tokens: Sequence[Tokens], pad_id: int, answer_only: bool = True) -> Batch:
    """Pad records on the right to the longest of them, for models that do not support packing."""
    lengths = [len(one) - 1 for one in tokens]
    longest = max(lengths)
    positions = [
        torch.arange(row * longest + one.first_target(answer_only) - 1, row * longest + length)
        for row, (length, one) in enumerate(zip(lengths, tokens, strict=True))
    ]
    return Batch(
        input_ids=torch.tensor([one.ids[:-1] + [pad_id] * (longest + 1 - len(one)) for one in tokens]),
        position_ids=torch.arange(longest).repeat(len(tokens), 1),
        attention_mask=torch.tensor([[1] * length + [0] * (longest - length) for length in lengths]),
        lengths=None,
        positions=torch.cat(positions),
        targets=_targets(tokens, answer_only),
    )


def _targets(tokens: Sequence[Tokens], answer_only: bool) -> Tensor:
    return torch.tensor([id for one in tokens for id in one.ids[one.first_target(answer_only) :]])


def _padded_size(lengths: list[int], packed: bool) -> int:
    return sum(lengths) if packed else len(lengths) * max(lengths)


def _chunks(records: list[int], size: int) -> list[list[int]]:
    return [records[start : start + size] for start in range(0, len(records), size)]
