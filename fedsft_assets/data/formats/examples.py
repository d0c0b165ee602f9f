"""Batches of a dataset's rows as columns, and the rows that cannot be used, with their reasons.

Readers of all formats yield `Examples`; nothing here knows a format or decides on a split.
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
    """A row that gives no record: its file, its number there (from 1), why, and what was found."""

    file: str
    row: int
    reason: str
    found: str


class Examples(NamedTuple):
    """Consecutive usable rows of one file, N of them, as text columns that share their order.

    A null is a text that the row does not have. `anchor` is the text that decides on a row's split,
    where that is not the whole input. `fields` are the columns' own names, for messages.
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
        """Those that have an instruction and a response, neither blank, and no text longer than `max_chars`."""
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
    """Examples of JSON objects. A missing field or one that is no text rejects its row; the context may be missing."""
    try:
        instruction, response = (
            texts([item[name] for item in objects]) for name in (columns.instruction, columns.response)
        )
        context = _optional(columns.context, objects)
    except (KeyError, AttributeError, UnicodeEncodeError):  # what is no text cannot be encoded
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
    """Examples of columns whose bytes nobody has checked yet; what is not UTF-8 rejects its row."""
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
    """The column as valid texts, and which of its values are not UTF-8: null in the texts; None if all are fine."""
    raw = column.cast(pa.binary())
    try:
        return raw.cast(pa.string()), None
    except pa.ArrowInvalid:
        values = [_decoded(value) for value in raw.to_pylist()]
        broken = np.array([value is _ABSENT for value in values])
        return texts([None if value is _ABSENT else value for value in values]), broken


def _longer(column: pa.StringArray, most: int) -> npt.NDArray[np.bool_]:
    """Which texts have more characters than that, bool [N]. Only those with more bytes can have."""
    longest = pc.max(pc.binary_length(column)).as_py()
    if longest is None or longest <= most:
        return np.zeros(len(column), bool)
    return np.array([text is not None and len(text) > most for text in column.to_pylist()])


def _optional(name: str | None, objects: Sequence[dict[str, Any]]) -> pa.StringArray:
    if name is None:
        return pa.nulls(len(objects), pa.string())
    return texts([item.get(name) for item in objects])


def _fault(item: dict[str, Any], columns: ColumnsSpec) -> tuple[str, Any] | None:
    """Why the object cannot be used, if so, and what was found."""
    for name in (columns.instruction, columns.response):
        if name not in item:
            return f"{name}: is missing", item
    for name in columns.names:
        value = item.get(name)
        if value is not None and not isinstance(value, str):
            kind = "dict" if isinstance(value, dict) else type(value).__name__
            return f"{name}: expected a text, found {kind}", value
        if value and (wrong := why_no_text(value)):
            return f"{name}: {wrong[0]}", wrong[1]
    return None


def _decoded(value: bytes | None) -> Any:
    try:
        return value if value is None else value.decode()
    except UnicodeDecodeError:
        return _ABSENT
