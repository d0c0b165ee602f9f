"""Reading CSV files with a header, in batches."""

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
    """The rows of a CSV file, numbered as a spreadsheet does: the header is row 1.

    Fields may hold line breaks inside quotes. A row with too many or too few fields is a rejected one.
    Raises DataError for a column that is missing or occurs twice, quotes that do not match, and a last
    row that is cut off.
    """
    csv.field_size_limit(sys.maxsize)  # what is too long is for the splits to say
    with path.open(encoding="utf-8-sig", errors=KEEP_BYTES, newline="") as file:
        rows = _Rows(file)
        try:
            header = next(rows, (1, []))[1]
            places = _places(path, header, columns)
            last: list[str] = []
            blanks = 0
            while batch := list(islice(rows, BATCH_ROWS)):
                last = batch[-1][1]
                blanks += sum(not fields[-1] for _, fields in batch if fields)
                yield _examples(path.name, len(header), [row for row in batch if row[1]], places, columns)
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise DataError(
                    f"{path}: row {rows.number + 1}: a quote is opened and never closed, up to the file's end in line "
                    f"{rows.line}; the file was cut off: download it again, or repair the quotes there"
                ) from error
            raise DataError(
                f"{path}: row {rows.number + 1}, line {rows.line}: is no CSV ({error}); repair the quotes there"
            ) from error
    # A text that is wanted may be blank here and there, but one that is blank only at the end was cut off before it.
    blank_at_end = blanks == 1 and header[-1] in (columns.instruction, columns.response)
    if last and _is_cut(last, _last_byte(path), len(header), blank_at_end):
        raise cut_off(path, rows.number, ",".join(last))


class _Rows(Iterator[tuple[int, list[str]]]):
    """The rows of an open file with their numbers, from 1; knows where it is when one cannot be read."""

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


def _places(path: Path, header: list[str], columns: ColumnsSpec) -> dict[str, int]:
    """The place of each column in a row."""
    missing = [name for name in columns.names if name not in header]
    if missing:
        found = excerpt(", ".join(header)) or "no header"
        raise DataError(f"{path}: column {', '.join(missing)}: is missing, found {found}; name the file's own columns")
    for name in columns.names:
        if header.count(name) > 1:
            places = " and ".join(str(place) for place, other in enumerate(header, start=1) if other == name)
            raise DataError(
                f"{path}: row 1: column {name}: is the name of columns {places}; give each a name of its own"
            )
    return {name: header.index(name) for name in columns.names}


def _examples(file: str, width: int, numbered: _NumberedRows, places: dict[str, int], columns: ColumnsSpec) -> Examples:
    rejected = [
        Rejected(file, row, f"expected {width} fields, found {len(fields)}", excerpt(", ".join(fields)))
        for row, fields in numbered
        if len(fields) != width
    ]
    whole = [(row, fields) for row, fields in numbered if len(fields) == width]
    objects = [{name: fields[place] for name, place in places.items()} for _, fields in whole]
    return from_objects(file, [row for row, _ in whole], objects, columns, rejected)


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read()


def _is_cut(fields: list[str], end: bytes, width: int, blank_at_end: bool) -> bool:
    """Whether the last row, where the file ends with this byte, is not whole.

    It is not if it has no line end and lacks fields, or ends inside a character or before its last text.
    A text that ends too early cannot be told from one that is whole.
    """
    if end in (b"\n", b"\r"):
        return False
    if len(fields) < width:
        return any(map(str.strip, fields))
    return ends_in_a_byte(fields[-1]) or (blank_at_end and end == b",")
