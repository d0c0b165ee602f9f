"""Reading JSON: one object in a line (JSONL), or one array of objects in a file, either in batches."""

import codecs
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from fedsft_assets.data.examples import BATCH_ROWS, Examples, Rejected, from_objects
from fedsft_assets.data.records import DataError, excerpt
from fedsft_assets.specs import ColumnsSpec

_BLOCK = 1 << 22  # bytes of lines that are parsed together


def read_lines(path: Path, columns: ColumnsSpec) -> Iterator[Examples]:
    """The rows of a JSONL file, numbered by their lines; blank lines are skipped.

    A line that is no JSON object is a rejected row. Raises DataError if no line has the fields.
    """
    wanted = _Wanted(path, columns)
    number = 1
    with path.open("rb") as file:
        _skip_mark(file)
        while lines := file.readlines(_BLOCK):
            rows, objects, rejected = _parse(path.name, number, lines)
            number += len(lines)
            wanted.look(objects)
            yield from_objects(path.name, rows, objects, columns, rejected)
    wanted.require()


def read_array(path: Path, columns: ColumnsSpec) -> Iterator[Examples]:
    """The rows of a JSON file that is one array of objects, numbered by their place in it.

    Raises DataError if the file is something else or ends too early, or if no object has the fields.
    """
    wanted = _Wanted(path, columns)
    items = _items(path)
    while batch := list(islice(items, BATCH_ROWS)):
        rejected = [_no_object(path.name, row, item) for row, item in batch if not isinstance(item, dict)]
        kept = [(row, item) for row, item in batch if isinstance(item, dict)]
        wanted.look([item for _, item in kept])
        yield from_objects(path.name, [row for row, _ in kept], [item for _, item in kept], columns, rejected)
    wanted.require()


def _items(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of a JSON array one at a time, with their numbers."""
    import ijson

    row = 0
    with path.open("rb") as file:
        _skip_mark(file)
        try:
            for item in ijson.items(file, "item", use_float=True):
                row += 1
                yield row, item
        except (ijson.JSONError, UnicodeDecodeError) as error:
            said = error.args[0] if error.args else error
            reason = str(said.decode(errors="replace") if isinstance(said, bytes) else said).strip().splitlines()[0]
            raise DataError(
                f"{path}: after row {row}: is not a JSON array of objects ({reason}); repair the file, or say "
                "'format: jsonl' if each line is an object"
            ) from error


def _skip_mark(file: BinaryIO) -> None:
    """Go to where the text begins: some programs put a byte order mark before it."""
    if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        file.seek(0)


class _Wanted:
    """Notices whether the fields occur in a file at all: a file without them is another dataset's."""

    def __init__(self, path: Path, columns: ColumnsSpec) -> None:
        self._path = path
        self._names = columns.names
        self._unseen = set(self._names)
        self._found: list[str] = []

    def look(self, objects: Sequence[dict[str, Any]]) -> None:
        if self._unseen and objects:
            self._found = self._found or list(objects[0])
            self._unseen -= {name for name in self._unseen for item in objects if name in item}

    def require(self) -> None:
        for name in self._names:
            if name in self._unseen:
                found = ", ".join(map(str, self._found)) if self._found else "no JSON object"
                raise DataError(
                    f"{self._path}: field {name}: is missing in every row, found {excerpt(found)}; take the file as "
                    "published, or name its own fields"
                )


def _parse(file: str, first: int, lines: list[bytes]) -> tuple[Sequence[int], list[Any], list[Rejected]]:
    """Numbers and objects of lines, the first of which has this number, and those that are none."""
    try:
        objects = list(map(orjson.loads, lines))
    except orjson.JSONDecodeError:
        return _parse_each(file, first, lines)
    if all(type(item) is dict for item in objects):
        return range(first, first + len(lines)), objects, []
    return _parse_each(file, first, lines)


def _parse_each(file: str, first: int, lines: list[bytes]) -> tuple[Sequence[int], list[Any], list[Rejected]]:
    rows: list[int] = []
    objects: list[Any] = []
    rejected: list[Rejected] = []
    for row, line in enumerate(lines, start=first):
        if not line.strip():
            continue
        try:
            item = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            rejected.append(Rejected(file, row, f"is not JSON: {error}", excerpt(line)))
            continue
        if isinstance(item, dict):
            rows.append(row)
            objects.append(item)
        else:
            rejected.append(_no_object(file, row, item))
    return rows, objects, rejected


def _no_object(file: str, row: int, item: Any) -> Rejected:
    return Rejected(file, row, f"expected a JSON object, found {type(item).__name__}", excerpt(item))
