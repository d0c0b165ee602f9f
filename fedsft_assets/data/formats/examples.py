"""Batches of a dataset's rows as columns, with the rejected rows and the reasons.

Readers of all formats yield `Examples`; nothing here depends on a format or assigns a split.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fedsft_assets.data.arrow import EMPTY, flags, numpy_flags, texts
from fedsft_assets.data.not_text import NOT_UTF8, why_no_text
from fedsft_assets.data.records import excerpt
from fedsft_assets.specs.dataset import ColumnsSpec

BATCH_ROWS = 4096

_ABSENT = object()


class Rejected(NamedTuple):
    """A row that cannot become a record: its file, its number (from 1), the reason, and what was found."""

    file: str
    row: int
    reason: str
    found: str


class Examples(NamedTuple):
    """N consecutive usable rows of one file, as aligned text columns [N].

    Null means that the row has no such text. `anchor` is the text that determines a row's split, if not
    the whole input. `fields` has the column names in the file, for messages.
    """

    file: str
    rows: npt.NDArray[np.int64]
    instruction: pa.StringArray
    context: pa.StringArray
    response: pa.StringArray
    fields: ColumnsSpec
    rejected: list[Rejected]
    anchor: pa.StringArray | None = None

    def usable(self, max_chars: int) -> "Examples":
        """Keep rows with a non-blank instruction and response and no text over `max_chars`; reject the others."""
        reasons = np.full(len(self.rows), "", object)
        for name, column, needed in (
            (self.fields.instruction, self.instruction, True),
            (self.fields.response, self.response, True),
            (self.fields.context, self.context, False),
        ):
            faults = {f"is longer than {max_chars} characters": _longer(column, max_chars)}
            if needed:
                faults["is null"] = numpy_flags(pc.is_null(column))
                faults["is blank"] = numpy_flags(pc.equal(pc.utf8_trim_whitespace(column), EMPTY))
            for reason, found in faults.items():
                if found.any():
                    reasons[found] = f"{name}: {reason}"
        wrong = reasons != ""
        if not wrong.any():
            return self
        rejected = [
            Rejected(self.file, int(self.rows[i]), reasons[i], excerpt(self.instruction[i].as_py() or ""))
            for i in np.flatnonzero(wrong)
        ]
        return self._select(~wrong)._replace(rejected=self.rejected + rejected)

    def _select(self, keep: npt.NDArray[np.bool_]) -> "Examples":
        chosen = flags(keep)
        return self._replace(
            rows=self.rows[keep],
            instruction=self.instruction.filter(chosen),
            context=self.context.filter(chosen),
            response=self.response.filter(chosen),
            anchor=None if self.anchor is None else self.anchor.filter(chosen),
        )


def from_objects(
    file: str, rows: Sequence[int], objects: Sequence[dict[str, Any]], columns: ColumnsSpec, rejected: list[Rejected]
) -> Examples:
    """Examples from JSON objects. Reject rows where a field is missing or not a string; the context may be missing."""
    try:
        instruction, response = (
            texts([item[name] for item in objects]) for name in (columns.instruction, columns.response)
        )
        context = _optional(columns.context, objects)
    except (KeyError, AttributeError, UnicodeEncodeError):
        faults = [_fault(item, columns) for item in objects]
        rejected = rejected + [
            Rejected(file, row, fault[0], excerpt(fault[1])) for row, fault in zip(rows, faults, strict=True) if fault
        ]
        good = [fault is None for fault in faults]
        rows = [row for row, fine in zip(rows, good, strict=True) if fine]
        objects = [item for item, fine in zip(objects, good, strict=True) if fine]
        return from_objects(file, rows, objects, columns, rejected)
    return Examples(file, np.asarray(rows, np.int64), instruction, context, response, columns, rejected)


def from_bytes(file: str, rows: npt.NDArray[np.int64], raw: dict[str, pa.Array], columns: ColumnsSpec) -> Examples:
    """Examples from columns not yet validated as UTF-8; reject rows that are not."""
    checked = {name: utf8(column) for name, column in raw.items()}
    bad = np.zeros(len(rows), bool)
    rejected: list[Rejected] = []
    for name, (_, broken) in checked.items():
        if broken is not None:
            column = raw[name].cast(pa.binary())
            rejected += [
                Rejected(file, int(rows[index]), f"{name}: {NOT_UTF8}", excerpt(column[index].as_py()))
                for index in np.flatnonzero(broken & ~bad)
            ]
            bad |= broken
    context = checked[columns.context][0] if columns.context else pa.nulls(len(rows), pa.string())
    instruction, response = checked[columns.instruction][0], checked[columns.response][0]
    examples = Examples(file, rows, instruction, context, response, columns, rejected)
    return examples._select(~bad) if bad.any() else examples


def utf8(column: pa.Array) -> tuple[pa.StringArray, npt.NDArray[np.bool_] | None]:
    """The column as strings, null where not UTF-8, and a mask [N] of those values, or None if there are none."""
    raw = column.cast(pa.binary())
    try:
        return raw.cast(pa.string()), None
    except pa.ArrowInvalid:
        values = [_decoded(value) for value in raw.to_pylist()]
        broken = np.array([value is _ABSENT for value in values])
        return texts([None if value is _ABSENT else value for value in values]), broken


def _longer(column: pa.StringArray, max_chars: int) -> npt.NDArray[np.bool_]:
    """Which texts have more than `max_chars` characters, bool [N]."""
    max_bytes = pc.max(pc.binary_length(column)).as_py()
    if max_bytes is None or max_bytes <= max_chars:  # a character takes at least one byte
        return np.zeros(len(column), bool)
    return np.array([text is not None and len(text) > max_chars for text in column.to_pylist()])


def _optional(name: str | None, objects: Sequence[dict[str, Any]]) -> pa.StringArray:
    if name is None:
        return pa.nulls(len(objects), pa.string())
    return texts([item.get(name) for item in objects])


def _fault(item: dict[str, Any], columns: ColumnsSpec) -> tuple[str, Any] | None:
    """The reason why an object cannot be used and what was found; None if it can."""
    for name in (columns.instruction, columns.response):
        if name not in item:
            return f"{name}: is missing", item
    for name in columns.names:
        value = item.get(name)
        if value is not None and not isinstance(value, str):
            kind = "dict" if isinstance(value, dict) else type(value).__name__
            return f"{name}: expected a string, found {kind}", value
        if value and (wrong := why_no_text(value)):
            return f"{name}: {wrong[0]}", wrong[1]
    return None


def _decoded(value: bytes | None) -> Any:
    try:
        return value if value is None else value.decode()
    except UnicodeDecodeError:
        return _ABSENT
