"""Records to tokens to batches: prompt template, answer-only targets, shuffled batches, micro-batches.

Relation to NeMo's GPTSFTDataset: the same records (`input`, `output`), the same kind of template, the
space before `{output}` tokenized with the answer, EOS appended and learned, loss on the answer only,
the context given up before the answer. Different: prompt and answer are tokenized as one text, the
context loses its beginning (NeMo's default drops its end), an answer that is cut gets no EOS because it
does not end there, and a special token spelled out in a record stays plain text, so that data cannot
end an answer.
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

# In which padded records are sorted by length. Batches of similar lengths are batches of similar records: a model
# learns less in a step. Four of them leave a tenth of padding, where shuffled batches have a third.
_BATCHES_IN_A_WINDOW = 4


@dataclass(frozen=True, slots=True)
class Tokens:
    """One record: `ids` are the prompt's and then the answer's, `prompt` says how many are the prompt's."""

    ids: list[int]
    prompt: int
    context_cut: bool = False
    answer_cut: bool = False

    def __len__(self) -> int:
        return len(self.ids)

    def first_target(self, answer_only: bool = True) -> int:
        """Where the tokens begin that have a loss: the answer, or all but the first, which nothing predicts."""
        return max(self.prompt, 1) if answer_only else 1

    def targets(self, answer_only: bool = True) -> int:
        """How many tokens have a loss, EOS among them."""
        return len(self.ids) - self.first_target(answer_only)


class Truncated(NamedTuple):
    """How many records lost a part of their context, and how many a part of their answer."""

    contexts: int
    answers: int


class Batch(NamedTuple):
    """Records for one forward pass, as a row without padding (`lengths` are theirs) or padded on the right.

    `input_ids` and `position_ids` are int64 [1, sum(lengths)] in a row, else [B, T] with `attention_mask` [B, T].
    `positions` [N] index the flattened inputs where a token with a loss is predicted, `targets` [N] are these tokens.
    The last token of a record predicts nothing and is no input.
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
    """Tokens of records, in their order, none longer than `max_length`.

    The prompt loses its beginning first (never the BOS token, never its last token); the answer
    loses its end, EOS included, only if it does not fit even then. `truncated` counts both.
    """
    records, style, encoder = list(records), template(prompt_template), TextEncoder.of(tokenizer)
    prompts = [style.prompt(record["input"]) for record in records]
    answers = [style.answer(record["output"]) for record in records]
    return [
        cut(ids[:prompt], ids[prompt:], max_length, encoder.front, tokenizer.eos_token_id)
        for ids, prompt in encoder.records(prompts, answers)
    ]


def cut(prompt: list[int], answer: list[int], max_length: int, front: Sequence[int], eos: int) -> Tokens:
    """One record of at most `max_length` tokens, `front` (BOS, more, or nothing) before it and `eos` at the end.

    Raises ValueError if there is no room for `front` and a token of the prompt.
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
    """Counts of what `tokenize` had to cut."""
    tokens = list(tokens)
    return Truncated(sum(one.context_cut for one in tokens), sum(one.answer_cut for one in tokens))


def training_batches(
    tokens: Sequence[Tokens], batch_size: int, seed: int | str, epoch: int, packed: bool
) -> list[list[int]]:
    """Indices of all records once, in batches: a function of the arguments and of the records' lengths only.

    Records are shuffled. Those that are not `packed` are sorted by length within windows of a few batches, and the
    batches shuffled again: less padding, and no order by length over the epoch. Only the last batch may be short.
    """
    order = list(range(len(tokens)))
    rng = random.Random(f"{seed}/{epoch}")
    rng.shuffle(order)
    full = len(order) - len(order) % batch_size
    if packed:
        batches = _cut(order[:full], batch_size)
    else:
        windows = _cut(order[:full], batch_size * _BATCHES_IN_A_WINDOW)
        by_length = [sorted(window, key=lambda index: len(tokens[index])) for window in windows]
        batches = [batch for window in by_length for batch in _cut(window, batch_size)]
        rng.shuffle(batches)
    return batches + ([order[full:]] if full < len(order) else [])


def evaluation_batches(tokens: Sequence[Tokens], batch_size: int) -> list[list[int]]:
    """Indices of all records once, in batches sorted by length, shortest first."""
    return _cut(sorted(range(len(tokens)), key=lambda index: len(tokens[index])), batch_size)


def micro_batches(
    tokens: Sequence[Tokens], indices: Sequence[int], most_records: int | None, most_tokens: int | None, packed: bool
) -> list[list[int]]:
    """A batch cut into parts that go through the model one after another, records of similar lengths together.

    No part has more than `most_records` records, or more than `most_tokens` tokens, padding among them where
    records are not `packed`; a record that is longer is a part of its own. One batch in one part stays in its order.
    """
    if not indices:
        return []
    most_records, most_tokens = most_records or len(indices), most_tokens or sys.maxsize
    if len(indices) <= most_records and _places([len(tokens[index]) for index in indices], packed) <= most_tokens:
        return [list(indices)]
    parts: list[list[int]] = []
    lengths: list[int] = []
    for index in sorted(indices, key=lambda index: len(tokens[index])):
        lengths.append(len(tokens[index]))
        if not parts or len(lengths) > most_records or _places(lengths, packed) > most_tokens:
            parts.append([])
            lengths = lengths[-1:]
        parts[-1].append(index)
    return parts


def pack(tokens: Sequence[Tokens], answer_only: bool = True) -> Batch:
    """Records one after another in a row. The loss is on their answers, or on all tokens but each record's first."""
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
    """Records padded on the right to the longest of them, for models that cannot be given rows of records."""
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


def _places(lengths: list[int], packed: bool) -> int:
    return sum(lengths) if packed else len(lengths) * max(lengths)


def _cut(records: list[int], size: int) -> list[list[int]]:
    return [records[start : start + size] for start in range(0, len(records), size)]
