"""Records in NeMo's SFT format: one JSON object with `input` and `output` per line of a split."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

import orjson

from fedsft_assets.data.json_objects import Ambiguous, decode
from fedsft_assets.data.not_text import printable

_CELL = 200  # characters of a text in a preview
_FOUND = 60  # characters of an excerpt in a message


class DataError(ValueError):
    """Unusable data; the message names the file, the row or field, what was found and what to do."""


class Record(TypedDict):
    """One line of a split in NeMo's SFT format."""

    input: str
    output: str


def dump_records(records: list[Record]) -> bytes:
    """Serialize records as lines of a JSONL split."""
    if not records:
        return b""
    # One call for all, then split into lines: quotes in JSON strings are escaped, so this sequence occurs
    # only between records.
    return orjson.dumps(records)[1:-1].replace(b'},{"input":', b'}\n{"input":') + b"\n"


def read_records(path: Path) -> list[Record]:
    """Read all records of a JSONL split, in file order. Raises DataError naming the file, line and field."""
    return list(iterate_records(path))


def iterate_records(path: Path) -> Iterator[Record]:
    """Yield the records of a JSONL split one at a time; errors as in `read_records`."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse_record(line, path, number)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; regenerate the splits") from error


def preview(records: Iterable[Record], n: int = 5) -> str:
    """Format the first `n` records as a Markdown table; long texts are shortened, special characters escaped."""
    rows = [f"| {_cell(record['input'])} | {_cell(record['output'])} |" for record in islice(records, n)]
    return "\n".join(["| input | output |", "| --- | --- |", *rows])


def excerpt(found: Any) -> str:
    """A short printable form of a value for messages; invalid characters are backslash escapes."""
    text = _printable(found).strip()
    return text if len(text) <= _FOUND else f"{text[:_FOUND]}…"


def cut_off(path: Path, row: int, found: str | bytes) -> DataError:
    """The error for a file that ends in the middle of a row, after `found`."""
    text = _printable(found[-4 * _FOUND - 4 :])  # a character has up to four bytes
    end = text if len(text) <= _FOUND else f"…{text[-_FOUND:]}"
    return DataError(f"{path}: row {row}: ends in the middle, after {end!r}: the file is truncated; download it again")


def _printable(found: Any) -> str:
    if isinstance(found, bytes):
        return found.decode(errors="backslashreplace")
    return printable(found) if isinstance(found, str) else repr(found)


def _parse_record(line: bytes, path: Path, number: int) -> Record:
    try:
        content = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DataError(
            f"{path}: line {number}: is not JSON ({error}), found {excerpt(line)!r}; regenerate the splits"
        ) from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: line {number}: expected a JSON object, found {excerpt(line)!r}; regenerate the splits"
        )
    for field in ("input", "output"):
        if not isinstance(content.get(field), str):
            found = repr(content[field]) if field in content else ", ".join(content) or "no field"
            raise DataError(f"{path}: line {number}: {field}: expected a string, found {found}; regenerate the splits")
    # Each field has a colon, so only a line with more colons than fields can have duplicates.
    if line.count(b":") > len(content) and isinstance(decoded := decode(line), Ambiguous):
        field, values = next(iter(decoded.repeated.items()))
        raise DataError(
            f"{path}: line {number}: {field}: occurs {len(values)} times, found {excerpt(values)}; "
            "regenerate the splits"
        )
    return Record(input=content["input"], output=content["output"])


def _cell(text: str) -> str:
    short = text if len(text) <= _CELL else f"{text[: _CELL - 1]}…"
    escaped = short.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return "<br>".join(escaped.splitlines())
