"""What data is made of: examples as datasets publish them, and records as NeMo's SFT reads them.

Readers yield examples; splits hold records. Nothing here knows a dataset or decides on a split.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import orjson

_CELL = 200


class DataError(ValueError):
    """Data that cannot be used: the message names the file, the row or field, what was found and what to do."""


class Example(NamedTuple):
    """One row of a dataset, text as published. `context` may be empty; blank others make it unusable."""

    instruction: str
    context: str
    response: str


class Record(TypedDict):
    """One line of a split in NeMo's SFT format."""

    input: str
    output: str


def dump_record(record: Record) -> bytes:
    """The record as its line of a JSONL split, newline included."""
    return orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)


def parse_record(line: bytes, path: Path, number: int) -> Record:
    """The record in line `number` (from 1) of a JSONL split.

    Raises DataError if it is not a JSON object with the texts `input` and `output`.
    """
    content = parse_json_object(line, path, number)
    for field in ("input", "output"):
        if not isinstance(content.get(field), str):
            found = repr(content[field]) if field in content else ", ".join(content) or "no field"
            raise DataError(f"{path}: line {number}: {field}: expected a text, found {found}; write the splits anew")
    return Record(input=content["input"], output=content["output"])


def parse_json_object(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """The JSON object in line `number` (from 1) of a file; DataError if it is none."""
    try:
        content = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise DataError(
            f"{path}: line {number}: is not JSON ({error}), found {_excerpt(line)!r}; repair or remove the line"
        ) from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: line {number}: expected a JSON object, found {_excerpt(line)!r}; repair or remove the line"
        )
    return content


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number (from 1) and bytes of each line that is not blank; DataError if the file cannot be read."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}; make it before what needs it") from error


def read_records(path: Path) -> list[Record]:
    """All records of a JSONL split, in the file's order.

    Raises DataError that names the file, the line and the field.
    """
    return [parse_record(line, path, number) for number, line in numbered_lines(path)]


def preview(records: Iterable[Record], n: int = 5) -> str:
    """The first `n` records as a Markdown table; long texts are cut, what would break a table is escaped."""
    rows = [f"| {_cell(record['input'])} | {_cell(record['output'])} |" for record in islice(records, n)]
    return "\n".join(["| input | output |", "| --- | --- |", *rows])


def _cell(text: str) -> str:
    short = text if len(text) <= _CELL else f"{text[: _CELL - 1]}…"
    escaped = short.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return "<br>".join(escaped.splitlines())


def _excerpt(line: bytes) -> str:
    text = line.decode(errors="replace").strip()
    return text if len(text) <= 60 else f"{text[:60]}…"
