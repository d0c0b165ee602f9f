"""Batched reader of CSV files with a header."""

import csv
import os
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from fedsft_assets.data.formats.examples import BATCH_ROWS, Examples, Rejected, from_objects
from fedsft_assets.data.not_text import KEEP_BYTES, ends_in_a_byte
from fedsft_assets.data.records import DataError, cut_off, excerpt
from fedsft_assets.specs.dataset import ColumnsSpec

_NumberedRows = list[tuple[int, list[str]]]


def read(path: Path, columns: ColumnsSpec) -> Iterator[Examples]:
    """Yield the rows of a CSV file, numbered as in a spreadsheet: the header is row 1.

    Quoted fields may contain line breaks. Rows with too many or too few fields are rejected. Raises
    DataError for a missing or duplicate column, unbalanced quotes, and a truncated last row.
    """
    csv.field_size_limit(sys.maxsize)  # `Examples.usable` rejects texts that are too long
    with path.open(encoding="utf-8-sig", errors=KEEP_BYTES, newline="") as file:
        rows = _Rows(file)
        try:
            header = next(rows, (1, []))[1]
            indexes = _column_indexes(path, header, columns)
            last: list[str] = []
            blanks = 0
            while batch := list(islice(rows, BATCH_ROWS)):
                last = batch[-1][1]
                blanks += sum(not fields[-1] for _, fields in batch if fields)
                yield _examples(path.name, len(header), [row for row in batch if row[1]], indexes, columns)
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise DataError(
                    f"{path}: row {rows.number + 1}: a quote is opened and never closed, the file ends at line "
                    f"{rows.line}; the file may be truncated: download it again, or fix the quotes"
                ) from error
            raise DataError(
                f"{path}: row {rows.number + 1}, line {rows.line}: is not valid CSV ({error}); fix the quotes there"
            ) from error
    # Any row may have a blank text, but if the last row is the only one, the file was truncated before that text.
    blank_at_end = blanks == 1 and header[-1] in (columns.instruction, columns.response)
    if last and _is_cut(last, _last_byte(path), len(header), blank_at_end):
        raise cut_off(path, rows.number, ",".join(last))


class _Rows(Iterator[tuple[int, list[str]]]):
    """The rows of an open file with their numbers, from 1; `number` and `line` locate an error."""

    def __init__(self, file: Iterator[str]) -> None:
        self.number = 0
        self._rows = csv.reader(file, strict=True)

    @property
    def line(self) -> int:
        return self._rows.line_num

    def __next__(self) -> tuple[int, list[str]]:
        fields = next(self._rows)
        self.number += 1
        return self.number, fields


def _column_indexes(path: Path, header: list[str], columns: ColumnsSpec) -> dict[str, int]:
    """The index of each column in a row, from 0."""
    missing = [name for name in columns.names if name not in header]
    if missing:
        found = excerpt(", ".join(header)) or "no header"
        raise DataError(
            f"{path}: column {', '.join(missing)}: is missing, found {found}; set columns to match the file"
        )
    for name in columns.names:
        if header.count(name) > 1:
            numbers = " and ".join(str(number) for number, other in enumerate(header, start=1) if other == name)
            raise DataError(f"{path}: row 1: column {name}: is the name of columns {numbers}; give each a unique name")
    return {name: header.index(name) for name in columns.names}


def _examples(
    file: str, width: int, numbered: _NumberedRows, indexes: dict[str, int], columns: ColumnsSpec
) -> Examples:
    rejected = [
        Rejected(file, row, f"expected {width} fields, found {len(fields)}", excerpt(", ".join(fields)))
        for row, fields in numbered
        if len(fields) != width
    ]
    complete = [(row, fields) for row, fields in numbered if len(fields) == width]
    objects = [{name: fields[index] for name, index in indexes.items()} for _, fields in complete]
    return from_objects(file, [row for row, _ in complete], objects, columns, rejected)


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read()


def _is_cut(fields: list[str], end: bytes, width: int, blank_at_end: bool) -> bool:
    """Whether the last row of a file that ends with this byte is truncated.

    It is if it has no line end and either lacks fields, ends inside a character, or ends before its last
    text. A truncation inside a text cannot be detected.
    """
    if end in (b"\n", b"\r"):
        return False
    if len(fields) < width:
        return any(map(str.strip, fields))
    return ends_in_a_byte(fields[-1]) or (blank_at_end and end == b",")
