"""Batched reader of Parquet columns, with errors that say what is wrong with the file."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fedsft_assets.data.formats.examples import BATCH_ROWS, Examples, from_bytes
from fedsft_assets.data.formats.prefetch import prefetched
from fedsft_assets.data.records import DataError
from fedsft_assets.specs.dataset import ColumnsSpec

TypeTest = Callable[[pa.DataType], bool]

_UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)
_BUFFER = 1 << 18  # bytes; streams a column's pages instead of loading a whole row group


def read(path: Path, columns: ColumnsSpec) -> Iterator[Examples]:
    """Yield the rows of a Parquet file. Raises DataError for a file that is broken or lacks these text columns."""
    names = columns.names
    start = 1
    for batch in parquet_batches(path, dict.fromkeys(names, is_text)):
        rows = np.arange(start, start + len(batch), dtype=np.int64)
        yield from_bytes(path.name, rows, {name: batch.column(name) for name in names}, columns)
        start += len(batch)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings, in any encoding."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def is_number(kind: pa.DataType) -> bool:
    """Whether a column of this type holds numbers; an all-null column counts."""
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind))


def is_boolean(kind: pa.DataType) -> bool:
    """Whether a column of this type holds booleans; an all-null column counts."""
    return bool(pa.types.is_boolean(kind) or pa.types.is_null(kind))


_EXPECTED: dict[TypeTest, str] = {is_text: "strings", is_number: "numbers", is_boolean: "booleans"}


def parquet_batches(path: Path, columns: Mapping[str, TypeTest]) -> Iterator[pa.RecordBatch]:
    """Yield these columns of a Parquet file in batches.

    Raises DataError for a missing or broken file, and for a column that is missing or of another type.
    """
    with open_parquet(path, columns) as file:
        try:
            yield from prefetched(file.iter_batches(batch_size=BATCH_ROWS, columns=list(columns)))
        except _UNREADABLE as error:
            raise _broken(path, error) from error


def open_parquet(path: Path, columns: Mapping[str, TypeTest]) -> pq.ParquetFile:
    """Open a Parquet file, and check that it has these columns with types that pass their tests."""
    try:
        file = pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True)
    except _UNREADABLE as error:
        raise _broken(path, error) from error
    schema = file.schema_arrow
    for name, test in columns.items():
        if name not in schema.names:
            problem = f"is missing, found {', '.join(schema.names) or 'no column'}"
        elif schema.names.count(name) > 1:
            problem = f"is the name of {schema.names.count(name)} columns, found {', '.join(schema.names)}"
        elif not test(schema.field(name).type):
            problem = f"expected {_EXPECTED[test]}, found {schema.field(name).type}"
        else:
            continue
        file.close()
        raise DataError(f"{path}: column {name}: {problem}; use the file as published, or set columns to match it")
    return file


def _broken(path: Path, error: Exception) -> DataError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"{path}: is not a complete Parquet file ({reason}); download it again")
