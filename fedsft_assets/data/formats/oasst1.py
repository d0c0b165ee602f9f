"""Reader of the OASST1 format: Parquet files of messages that form trees of prompts and ranked replies.

The first pass reads all message ids, as hashes; the second streams the texts and holds each only until
the last reply that needs it. Format: https://huggingface.co/datasets/OpenAssistant/oasst1
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fedsft_assets.data.arrow import BLANK_LINE, EMPTY, flags, numpy_flags, numpy_numbers, rows, texts
from fedsft_assets.data.formats.examples import Examples, Rejected, utf8
from fedsft_assets.data.formats.parquet import TypeTest, is_boolean, is_number, is_text, parquet_batches
from fedsft_assets.data.hashing import Hashes, text_hashes
from fedsft_assets.data.not_text import NOT_UTF8
from fedsft_assets.data.records import DataError, excerpt
from fedsft_assets.specs.dataset import ColumnsSpec, ConversationsSpec

_FIELDS = ColumnsSpec(instruction="text of the prompt", response="text")
_TREE: dict[str, TypeTest] = {
    "message_id": is_text,
    "parent_id": is_text,
    "role": is_text,
    "lang": is_text,
    "rank": is_number,
}

Rows = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


def read(paths: Sequence[Path], options: ConversationsSpec) -> Iterator[Examples]:
    """Yield each best assistant reply (rank 0) with the prompt it answers, or the whole path to it.

    The options select replies by language, and by the reviews and flags of the reply and its input.
    Replies whose parent is missing or not a prompt, or that are part of a cycle, are rejected. Raises
    DataError for a file that is broken or of another format.
    """
    messages = _Messages.scan(paths, options)
    whole = options.context == "path"
    replies, faults = messages.replies(whole)
    paths_to = messages.paths(replies, whole)
    allowed = paths_to.all_of(messages.allowed)
    yield from _stream(paths, messages, replies[allowed], paths_to.select(allowed), faults)


@dataclass(frozen=True)
class _Paths:
    """The input messages of N replies, concatenated: `rows` [M], and where each path ends in them, `ends` [N]."""

    rows: Rows
    ends: Rows

    @property
    def starts(self) -> Rows:
        return np.concatenate([[0], self.ends[:-1]]).astype(np.int64)

    def all_of(self, flags: Flags) -> Flags:
        """Which paths have only messages with this flag, bool [N]."""
        unflagged = np.concatenate([[0], np.cumsum(~flags[self.rows])])
        return unflagged[self.ends] == unflagged[self.starts]

    def last(self) -> Rows:
        """The highest row of each path [N]."""
        return np.maximum.reduceat(self.rows, self.starts) if len(self.ends) else self.rows

    def select(self, keep: Flags) -> "_Paths":
        lengths = self.ends - self.starts
        return _Paths(self.rows[np.repeat(keep, lengths)], np.cumsum(lengths[keep]))

    def order(self, order: Rows) -> "_Paths":
        lengths = (self.ends - self.starts)[order]
        ends = np.cumsum(lengths)
        within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
        return _Paths(self.rows[np.repeat(self.starts[order], lengths) + within], ends)


@dataclass(frozen=True)
class _Messages:
    """The M messages of all files by row: what is needed to find paths, without the texts."""

    counts: list[int]  # messages per file
    parents: Rows  # the parent's row [M + 2]; M for a root, M + 1 if no message or several have the parent's id
    ambiguous: Flags  # several messages have the parent's id [M]
    prompts: Flags  # [M]
    wanted: Flags  # replies of the requested rank and languages [M]
    allowed: Flags  # reviewed enough and without an excluded flag [M]

    @classmethod
    def scan(cls, paths: Sequence[Path], options: ConversationsSpec) -> "_Messages":
        columns = dict(_TREE)
        if options.min_review_count:
            columns["review_count"] = is_number
        columns |= dict.fromkeys(options.leave_out, is_boolean)
        parts = []
        counts = []
        for path in paths:
            found = [_scan(batch, options) for batch in parquet_batches(path, columns)]
            counts.append(sum(len(part[0]) for part in found))
            parts += found
        ids, parent_ids, root, prompts, wanted, allowed = (
            (np.concatenate(column) for column in zip(*parts, strict=True)) if parts else (np.zeros(0, bool),) * 6
        )
        return cls(counts, *_parents(ids, parent_ids, root), prompts, wanted, allowed)

    def replies(self, whole: bool) -> tuple[Rows, dict[int, str]]:
        """The rows of all wanted replies with an input [N], and by row the reason why others have none."""
        m = len(self.wanted)
        found = np.flatnonzero(self.wanted & self.allowed)
        parents, roots = self.parents[found], self._roots()[found]
        faults = [
            (roots < m, "parent_id: is part of a cycle"),
            (parents == m, "parent_id: is null, but a reply needs a prompt"),
            (self.ambiguous[found], "parent_id: several messages have this id"),
            (parents == m + 1, "parent_id: no message has this id"),
            (~np.concatenate([self.prompts, [True, True]])[parents], "parent_id: is not a prompt"),
            ((roots == m + 1) & whole, "parent_id: the parent of a message further up is missing"),
        ]
        wrong = np.logical_or.reduce([where for where, _ in faults])
        reasons = np.select([where for where, _ in faults], [reason for _, reason in faults], "")
        return found[~wrong], {int(row): str(reason) for row, reason in zip(found[wrong], reasons[wrong], strict=True)}

    def paths(self, replies: Rows, whole: bool) -> _Paths:
        """The prompt of each reply, or if `whole`, all messages from the root to the prompt."""
        m = len(self.wanted)
        levels = [self.parents[replies]]
        while whole and (levels[-1] < m).any():
            levels.append(self.parents[levels[-1]])
        table = np.stack(levels[::-1], axis=1)
        kept = table < m
        return _Paths(table[kept], np.cumsum(kept.sum(axis=1)))

    def _roots(self) -> Rows:
        """What each message's ancestry ends in [M]: M is a root, M + 1 a missing parent, less than M a cycle."""
        ancestors = self.parents
        for _ in range(len(ancestors).bit_length()):  # each squaring doubles the steps
            ancestors = ancestors[ancestors]
        return ancestors[: len(self.wanted)]


def _scan(batch: pa.RecordBatch, options: ConversationsSpec) -> tuple[Hashes, Hashes, Flags, Flags, Flags, Flags]:
    wanted = _equal(batch["role"], "assistant") & (numpy_numbers(batch["rank"]) == 0)
    if options.languages:
        wanted &= numpy_flags(pc.is_in(_text(batch["lang"]), texts(options.languages)))
    allowed = np.ones(len(batch), bool)
    if options.min_review_count:
        allowed &= numpy_numbers(batch["review_count"]) >= options.min_review_count
    for name in options.leave_out:
        allowed &= ~numpy_flags(batch[name].cast(pa.bool_()))
    return (
        text_hashes(batch["message_id"]),
        text_hashes(batch["parent_id"]),
        numpy_flags(pc.is_null(batch["parent_id"])),
        _equal(batch["role"], "prompter"),
        wanted,
        allowed,
    )


def _text(column: pa.Array) -> pa.StringArray:
    """A column of short codes as plain strings; null where not UTF-8."""
    return utf8(column)[0]


def _equal(column: pa.Array, value: str) -> Flags:
    return numpy_flags(pc.equal(_text(column), texts([value])[0]))


def _parents(ids: Hashes, parents: Hashes, root: Flags) -> tuple[Rows, Flags]:
    """`_Messages.parents` [M + 2] and `_Messages.ambiguous` [M]."""
    m = len(ids)
    order = np.argsort(ids, kind="stable")
    known = ids[order]
    first = np.searchsorted(known, parents)
    found = np.searchsorted(known, parents, side="right") - first
    rows = np.where(found == 1, order[np.minimum(first, m - 1)], m + 1)
    return np.concatenate([np.where(root, m, rows), [m, m + 1]]).astype(np.int64), (found > 1) & ~root


def _stream(
    paths: Sequence[Path], messages: _Messages, replies: Rows, inputs: _Paths, faults: dict[int, str]
) -> Iterator[Examples]:
    """Read all texts once; yield a pair as soon as its last message has been read."""
    complete = np.maximum(replies, inputs.last())
    order = np.argsort(complete, kind="stable")
    complete, replies, inputs = complete[order], replies[order], inputs.order(order)
    pending = _PendingTexts(messages, replies, inputs, complete)
    start = 0
    for path, count in zip(paths, messages.counts, strict=True):
        first = start
        for batch in parquet_batches(path, {"text": is_text}):
            stop = start + len(batch)
            pending.read(batch["text"], start)
            ready = slice(*np.searchsorted(complete, [start, stop]))
            rejected = [
                Rejected(path.name, row - first + 1, faults[row], excerpt(batch["text"][row - start].as_py()))
                for row in range(start, stop)
                if row in faults
            ]
            yield pending.examples(path.name, first, ready, rejected)
            pending.forget(stop)
            start = stop
        if start - first != count:
            raise DataError(f"{path}: changed while it was being read; start again")


class _PendingTexts:
    """The texts that are still needed, in row order."""

    def __init__(self, messages: _Messages, replies: Rows, inputs: _Paths, complete: Rows) -> None:
        self._messages, self._replies, self._inputs = messages, replies, inputs
        m = len(messages.wanted)
        self._last_use = np.full(m, -1, np.int64)
        np.maximum.at(self._last_use, inputs.rows, np.repeat(complete, inputs.ends - inputs.starts))
        np.maximum.at(self._last_use, replies, complete)
        self._rows = np.zeros(0, np.int64)
        self._texts = texts([])
        self._broken = np.zeros(0, np.int64)

    def read(self, column: pa.Array, start: int) -> None:
        needed = np.flatnonzero(self._last_use[start : start + len(column)] >= 0)
        fresh, broken = utf8(column.take(rows(needed)))
        self._rows = np.concatenate([self._rows, needed + start])
        self._texts = pa.concat_arrays([self._texts, fresh])
        if broken is not None:
            self._broken = np.concatenate([self._broken, needed[broken] + start])

    def forget(self, stop: int) -> None:
        needed = self._last_use[self._rows] >= stop
        self._rows, self._texts = self._rows[needed], self._texts.filter(flags(needed))

    def examples(self, file: str, first: int, ready: slice, rejected: list[Rejected]) -> Examples:
        replies = self._replies[ready]
        ends = self._inputs.ends[ready]
        base = self._inputs.ends[ready.start - 1] if ready.start else 0
        path = _Paths(self._inputs.rows[base : ends[-1] if len(ends) else base], ends - base)
        if len(self._broken):
            fine = ~np.isin(replies, self._broken) & path.all_of(~np.isin(np.arange(len(self._last_use)), self._broken))
            rejected = rejected + [
                Rejected(file, int(row) - first + 1, f"text: of the reply or its input {NOT_UTF8}", "")
                for row in replies[~fine]
            ]
            replies, path = replies[fine], path.select(fine)
        instruction, anchor = self._inputs_of(path)
        response = self._take(replies)
        context = pa.nulls(len(replies), pa.string())
        return Examples(file, replies - first + 1, instruction, context, response, _FIELDS, rejected, anchor)

    def _inputs_of(self, path: _Paths) -> tuple[pa.StringArray, pa.StringArray | None]:
        """Each path as one text [N], with speakers if it has several turns; and first messages [N], None if all are."""
        found = self._take(path.rows)
        if len(path.rows) == len(path.ends):
            return found, None
        several = np.repeat(path.ends - path.starts > 1, path.ends - path.starts)
        speakers = np.where(several, np.where(self._messages.prompts[path.rows], "User: ", "Assistant: "), "")
        turns = pc.binary_join_element_wise(texts(speakers.tolist()), found, EMPTY)
        offsets = rows(np.concatenate([[0], path.ends])).cast(pa.int32())
        inputs = pc.binary_join(pa.ListArray.from_arrays(offsets, turns), BLANK_LINE)
        return inputs, found.take(rows(path.starts))

    def _take(self, wanted: Rows) -> pa.StringArray:
        return self._texts.take(rows(np.searchsorted(self._rows, wanted)))
