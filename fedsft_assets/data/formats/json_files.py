"""Batched readers of JSON: one object per line (JSONL), or one array of objects per file."""

import codecs
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from fedsft_assets.data.formats import json_array
from fedsft_assets.data.formats.examples import BATCH_ROWS, Examples, Rejected, from_objects
from fedsft_assets.data.json_objects import Ambiguous, decode
from fedsft_assets.data.records import DataError, cut_off, excerpt
from fedsft_assets.specs.dataset import ColumnsSpec

_BLOCK = 1 << 22  # bytes of lines to parse at a time
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)

_Numbered = list[tuple[int, Any]]


def read_lines(path: Path, columns: ColumnsSpec, block: int = _BLOCK) -> Iterator[Examples]:
    """Yield the rows of a JSONL file, numbered by line, parsing `block` bytes at a time; blank lines are skipped.

    Lines that are not JSON objects are rejected. Raises DataError if a field is missing in every line, or
    if the file ends in the middle of a line.
    """
    fields = _Fields(path, columns)
    number = 1
    with path.open("rb") as file:
        _skip_byte_order_mark(file)
        while lines := file.readlines(block):
            items, rejected = _parse(path, number, lines)
            number += len(lines)
            yield fields.examples(items, rejected)
    fields.require()


def read_array(path: Path, columns: ColumnsSpec) -> Iterator[Examples]:
    """Yield the rows of a JSON file that is one array of objects, numbered by position from 1.

    Raises DataError if the file is something else or truncated, or if a field is missing in every object.
    """
    fields = _Fields(path, columns)
    items = json_array.values(path)
    while batch := list(islice(items, BATCH_ROWS)):
        yield fields.examples(batch, [])
    fields.require()


def _skip_byte_order_mark(file: BinaryIO) -> None:
    if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        file.seek(0)


class _Fields:
    """The fields to read from a file; tracks which never occur, as in a file of another dataset."""

    def __init__(self, path: Path, columns: ColumnsSpec) -> None:
        self._path = path
        self._columns = columns
        self._unseen = set(columns.names)
        self._found: list[str] = []
        self._first_rejected: Rejected | None = None

    def examples(self, items: _Numbered, rejected: list[Rejected]) -> Examples:
        """Examples from numbered values. Reject values that are not objects, and objects that repeat a field."""
        if any(type(item) is not dict for _, item in items):
            faults = [self._fault(row, item) for row, item in items]
            rejected = rejected + [fault for fault in faults if fault]
            items = [numbered for numbered, fault in zip(items, faults, strict=True) if fault is None]
        self._first_rejected = self._first_rejected or next(iter(rejected), None)
        objects = [item for _, item in items]
        self._mark_seen(objects)
        return from_objects(self._path.name, [row for row, _ in items], objects, self._columns, rejected)

    def require(self) -> None:
        """Raise DataError if a field has not occurred in any row."""
        for name in self._columns.names:
            if name in self._unseen:
                found = excerpt(", ".join(self._found)) if self._found else "no JSON object"
                if not self._found and self._first_rejected:
                    found += f" (row {self._first_rejected.row}: {self._first_rejected.reason})"
                raise DataError(
                    f"{self._path}: field {name}: is missing in every row, found {found}; use the file as "
                    "published, or set columns to match it"
                )

    def _mark_seen(self, objects: Sequence[dict[str, Any]]) -> None:
        if self._unseen and objects:
            self._found = self._found or list(objects[0])
            self._unseen -= {name for name in self._unseen for item in objects if name in item}

    def _fault(self, row: int, item: Any) -> Rejected | None:
        if not isinstance(item, dict):
            reason = f"expected a JSON object, found {type(item).__name__}"
            return Rejected(self._path.name, row, reason, excerpt(item))
        if isinstance(item, Ambiguous):
            for name in self._columns.names:
                if values := item.repeated.get(name):
                    return Rejected(self._path.name, row, f"{name}: occurs {len(values)} times", excerpt(values))
        return None


def _parse(path: Path, first: int, lines: list[bytes]) -> tuple[_Numbered, list[Rejected]]:
    """Parse lines numbered from `first`; return the values and the lines that are not JSON."""
    items: _Numbered = []
    rejected: list[Rejected] = []
    for row, line in enumerate(lines, start=first):
        try:
            items.append((row, decode(line)))
        except ValueError as error:
            if not line.strip():
                continue
            if not line.endswith(b"\n") and _is_cut(line):
                raise cut_off(path, row, line) from error
            rejected.append(Rejected(path.name, row, f"is not JSON: {error}", excerpt(line)))
    return items, rejected


def _is_cut(line: bytes) -> bool:
    """Whether a string, object or array is still open at the end of the line."""
    rest = _STRING.sub(b"", line)
    return b'"' in rest or rest.count(b"{") + rest.count(b"[") > rest.count(b"}") + rest.count(b"]")
