"""Records as NeMo's SFT reads them: one JSON object with `input` and `output` in each line of a split."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

import orjson

from fedsft_assets.data.json_objects import Ambiguous, decode
from fedsft_assets.data.not_text import printable

_CELL = 200
_FOUND = 60


class DataError(ValueError):
    """Data that cannot be used: the message names the file, the row or field, what was found and what to do."""


class Record(TypedDict):
    """One line of a split in NeMo's SFT format."""

    input: str
    output: str


def dump_records(records: list[Record]) -> bytes:
    """The records as lines of a JSONL split."""
    if not records:
        return b""
    # One call for all, then one line each. Inside a JSON string every quote has a backslash, so this
    # sequence stands between two records and nowhere else.
    return orjson.dumps(records)[1:-1].replace(b'},{"input":', b'}\n{"input":') + b"\n"


def read_records(path: Path) -> list[Record]:
    """All records of a JSONL split, in the file's order.

    Raises DataError that names the file, the line and the field.
    """
    return list(iterate_records(path))


def iterate_records(path: Path) -> Iterator[Record]:
    """The records of a JSONL split one at a time; errors as in `read_records`."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse_record(line, path, number)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; make it before what needs it") from error


def preview(records: Iterable[Record], n: int = 5) -> str:
    """The first `n` records as a Markdown table; long texts are cut, what would break a table is escaped."""
    rows = [f"| {_cell(record['input'])} | {_cell(record['output'])} |" for record in islice(records, n)]
    return "\n".join(["| input | output |", "| --- | --- |", *rows])


def excerpt(found: Any) -> str:
    """What was found, short enough for a message; what is no text is shown with backslashes."""
    text = _printable(found).strip()
    return text if len(text) <= _FOUND else f"{text[:_FOUND]}…"


def cut_off(path: Path, row: int, found: str | bytes) -> DataError:
    """The error for a file that ends in the middle of a row, of which this is there."""
    text = _printable(found[-4 * _FOUND - 4 :])  # a character has up to four bytes
    end = text if len(text) <= _FOUND else f"…{text[-_FOUND:]}"
    return DataError(
        f"{path}: row {row}: ends in the middle, after {end!r}, and so does the file: it was cut off; download it again"
    )


def _printable(found: Any) -> str:
    if isinstance(found, bytes):
        return found.decode(errors="backslashreplace")
    return printable(found) if isinstance(found, str) else repr(found)


def _parse_record(line: bytes, path: Path, number: int) -> Record:
    try:
        content = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DataError(
            f"{path}: line {number}: is not JSON ({error}), found {excerpt(line)!r}; write the splits anew"
        ) from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: line {number}: expected a JSON object, found {excerpt(line)!r}; write the splits anew"
        )
    for field in ("input", "output"):
        if not isinstance(content.get(field), str):
            found = repr(content[field]) if field in content else ", ".join(content) or "no field"
            raise DataError(f"{path}: line {number}: {field}: expected a text, found {found}; write the splits anew")
    # Each field has a colon: only a line with more of them than fields can say one twice.
    if line.count(b":") > len(content) and isinstance(twice := decode(line), Ambiguous):
        field, values = next(iter(twice.repeated.items()))
        raise DataError(
            f"{path}: line {number}: {field}: occurs {len(values)} times, found {excerpt(values)}; "
            "write the splits anew"
        )
    return Record(input=content["input"], output=content["output"])


def _cell(text: str) -> str:
    short = text if len(text) <= _CELL else f"{text[: _CELL - 1]}…"
    escaped = short.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return "<br>".join(escaped.splitlines())
