"""Reading JSON: one object in a line (JSONL), or one array of objects in a file, either in batches."""

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

_BLOCK = 1 << 22  # bytes of lines that are parsed together
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)

_Numbered = list[tuple[int, Any]]


def read_lines(path: Path, columns: ColumnsSpec) -> Iterator[Examples]:
    """The rows of a JSONL file, numbered by their lines; blank lines are skipped.

    A line that is no JSON object is a rejected row. Raises DataError if no line has the fields, or if the
    file ends in the middle of one.
    """
    wanted = _Wanted(path, columns)
    number = 1
    with path.open("rb") as file:
        _skip_mark(file)
        while lines := file.readlines(_BLOCK):
            items, rejected = _parse(path, number, lines)
            number += len(lines)
            yield wanted.examples(items, rejected)
    wanted.require()


def read_array(path: Path, columns: ColumnsSpec) -> Iterator[Examples]:
    """The rows of a JSON file that is one array of objects, numbered by their place in it.

    Raises DataError if the file is something else or ends too early, or if no object has the fields.
    """
    wanted = _Wanted(path, columns)
    items = json_array.values(path)
    while batch := list(islice(items, BATCH_ROWS)):
        yield wanted.examples(batch, [])
    wanted.require()


def _skip_mark(file: BinaryIO) -> None:
    """Go to where the text begins: some programs put a byte order mark before it."""
    if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        file.seek(0)


class _Wanted:
    """The fields of a file that are wanted: notices whether they occur at all, or it is another dataset's."""

    def __init__(self, path: Path, columns: ColumnsSpec) -> None:
        self._path = path
        self._columns = columns
        self._unseen = set(columns.names)
        self._found: list[str] = []
        self._first_rejected: Rejected | None = None

    def examples(self, items: _Numbered, rejected: list[Rejected]) -> Examples:
        """Examples of values with their numbers. What is no object, or says a wanted field twice, is rejected."""
        if any(type(item) is not dict for _, item in items):
            faults = [self._fault(row, item) for row, item in items]
            rejected = rejected + [fault for fault in faults if fault]
            items = [numbered for numbered, fault in zip(items, faults, strict=True) if fault is None]
        self._first_rejected = self._first_rejected or next(iter(rejected), None)
        objects = [item for _, item in items]
        self._look(objects)
        return from_objects(self._path.name, [row for row, _ in items], objects, self._columns, rejected)

    def require(self) -> None:
        for name in self._columns.names:
            if name in self._unseen:
                found = excerpt(", ".join(self._found)) if self._found else "no JSON object"
                if not self._found and self._first_rejected:
                    found += f" (row {self._first_rejected.row}: {self._first_rejected.reason})"
                raise DataError(
                    f"{self._path}: field {name}: is missing in every row, found {found}; take the file as "
                    "published, or name its own fields"
                )

    def _look(self, objects: Sequence[dict[str, Any]]) -> None:
        if self._unseen and objects:
            self._found = self._found or list(objects[0])
            self._unseen -= {name for name in self._unseen for item in objects if name in item}

    def _fault(self, row: int, item: Any) -> Rejected | None:
        if not isinstance(item, dict):
            found = f"expected a JSON object, found {type(item).__name__}"
            return Rejected(self._path.name, row, found, excerpt(item))
        if isinstance(item, Ambiguous):
            for name in self._columns.names:
                if values := item.repeated.get(name):
                    return Rejected(self._path.name, row, f"{name}: occurs {len(values)} times", excerpt(values))
        return None


def _parse(path: Path, first: int, lines: list[bytes]) -> tuple[_Numbered, list[Rejected]]:
    """The values of lines, the first of which has this number, and those that are not JSON."""
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
    """Whether a string, object or array is open at the end, as in every beginning of an object."""
    signs = _STRING.sub(b"", line)
    return b'"' in signs or signs.count(b"{") + signs.count(b"[") > signs.count(b"}") + signs.count(b"]")
