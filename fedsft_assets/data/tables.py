"""Reading columns of Parquet and JSONL files, with errors that say what is wrong with the file.

Shared by the modules of the formats; knows files and columns, not what they mean.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fedsft_assets.data.records import DataError, numbered_lines, parse_json_object

_BATCH_ROWS = 4096

TypeTest = Callable[[pa.DataType], bool]


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds texts, however encoded."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_number(kind: pa.DataType) -> bool:
    """Whether a column of this type holds numbers; one with only nulls counts."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind))


def parquet_texts(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The rows of a Parquet file as tuples of these text columns, in batches; a null becomes "".

    Raises DataError for a missing or broken file, a missing column or one that holds no texts.
    """
    with open_parquet(path, dict.fromkeys(columns, is_text)) as file:
        try:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=list(columns)):
                yield from zip(*(texts(batch.column(name)) for name in columns), strict=True)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise broken_parquet(path, error) from error


def parquet_table(path: Path, columns: Mapping[str, TypeTest]) -> pa.Table:
    """These columns of a Parquet file, text columns as plain strings; errors as in `parquet_texts`."""
    with open_parquet(path, columns) as file:
        try:
            table = file.read(columns=list(columns))
            for index, (name, test) in enumerate(columns.items()):
                if test is is_text:
                    table = table.set_column(index, name, table.column(name).cast(pa.string()))
        except (pa.ArrowException, OSError) as error:
            raise broken_parquet(path, error) from error
    return table


def texts(column: pa.Array | pa.ChunkedArray) -> list[str]:
    """A text column as Python strings; a null becomes ""."""
    values: list[str] = (column if column.null_count == 0 else column.cast(pa.string()).fill_null("")).to_pylist()
    return values


def open_parquet(path: Path, columns: Mapping[str, TypeTest]) -> pq.ParquetFile:
    """The open file, once its footer reads and it has these columns with types that pass their tests."""
    require_file(path)
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise broken_parquet(path, error) from error
    schema = file.schema_arrow
    for name, test in columns.items():
        if name not in schema.names:
            problem = f"is missing, found {', '.join(schema.names) or 'no column'}"
        elif not test(schema.field(name).type):
            expected = "texts" if test is is_text else "numbers"
            problem = f"expected {expected}, found {schema.field(name).type}"
        else:
            continue
        file.close()
        raise DataError(f"{path}: column {name}: {problem}; take the file as published")
    return file


def json_lines_texts(path: Path, fields: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The lines of a JSONL file as tuples of these text fields, one line at a time; a null becomes "".

    Raises DataError for a missing file, a line that is not a JSON object, a missing field or one
    that is not a text.
    """
    require_file(path)
    for number, line in numbered_lines(path):
        content = parse_json_object(line, path, number)
        yield tuple(_text(content, field, path, number) for field in fields)


def count_rows(path: Path) -> int:
    """Rows of a Parquet file, or lines with content of any other."""
    if path.suffix == ".parquet":
        with open_parquet(path, {}) as file:
            return int(file.metadata.num_rows)
    return sum(1 for _ in numbered_lines(path))


def require_file(path: Path) -> None:
    """Raise DataError unless there is a file at `path` with something in it."""
    if not path.is_file():
        raise DataError(f"{path}: is missing; put the file there as published")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty; download it again")


def broken_parquet(path: Path, error: Exception) -> DataError:
    """The error for a file that pyarrow cannot read."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"{path}: is not a whole Parquet file ({reason}); download it again")


def _text(content: dict[str, Any], field: str, path: Path, number: int) -> str:
    if field not in content:
        found = ", ".join(content) or "no field"
        raise DataError(f"{path}: line {number}: {field}: is missing, found {found}; repair or remove the line")
    value = content[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{path}: line {number}: {field}: expected a text, found {value!r}; repair or remove the line")
    return value
