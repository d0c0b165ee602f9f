"""Reading CSV files with a header, in batches."""

import csv
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from fedsft_assets.data.examples import BATCH_ROWS, Examples, Rejected, from_objects
from fedsft_assets.data.records import DataError, excerpt
from fedsft_assets.specs import ColumnsSpec


def read(path: Path, columns: ColumnsSpec) -> Iterator[Examples]:
    """The rows of a CSV file, numbered as a spreadsheet does: the header is row 1.

    Fields may hold line breaks inside quotes. A row with too many or too few fields is a rejected
    one. Raises DataError for a missing column, or quotes that do not match.
    """
    csv.field_size_limit(sys.maxsize)  # what is too long is for the splits to say
    number = 1
    # A byte that is not UTF-8 comes through as half of a surrogate pair, which no text can have otherwise.
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            header = next(rows, [])
            places = _places(path, header, columns)
            while batch := list(islice(rows, BATCH_ROWS)):
                numbered = [(row, fields) for row, fields in enumerate(batch, start=number + 1) if fields]
                number += len(batch)
                yield _examples(path.name, len(header), numbered, places, columns)
        except csv.Error as error:
            raise DataError(
                f"{path}: after row {number}, line {rows.line_num}: is no CSV ({error}); repair the quotes there"
            ) from error


def _places(path: Path, header: list[str], columns: ColumnsSpec) -> dict[str, int]:
    """The place of each column in a row."""
    missing = [name for name in columns.names if name not in header]
    if missing:
        found = excerpt(", ".join(header)) or "no header"
        raise DataError(f"{path}: column {', '.join(missing)}: is missing, found {found}; name the file's own columns")
    return {name: header.index(name) for name in columns.names}


def _examples(
    file: str, width: int, numbered: list[tuple[int, list[str]]], places: dict[str, int], columns: ColumnsSpec
) -> Examples:
    rejected = [
        Rejected(file, row, f"expected {width} fields, found {len(fields)}", excerpt(", ".join(fields)))
        for row, fields in numbered
        if len(fields) != width
    ]
    whole = [(row, fields) for row, fields in numbered if len(fields) == width]
    objects = [{name: fields[place] for name, place in places.items()} for _, fields in whole]
    return from_objects(file, [row for row, _ in whole], objects, columns, rejected)
