"""Reader of a dataset's files by its spec, whatever their format."""

from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from fedsft_assets.data.arrow import numpy_flags
from fedsft_assets.data.formats import csv_files, json_files, oasst1, parquet
from fedsft_assets.data.formats.examples import Examples
from fedsft_assets.data.formats.file_kind import require_kind
from fedsft_assets.data.records import DataError, excerpt
from fedsft_assets.specs.dataset import ConversationsSpec, DatasetSpec

_READERS = {
    "parquet": parquet.read,
    "jsonl": json_files.read_lines,
    "json": json_files.read_array,
    "csv": csv_files.read,
}
_TEXTS = ("instruction", "context", "response")
_PAIRS = tuple(combinations(_TEXTS, 2))


def read_examples(dataset: DatasetSpec, folder: Path) -> Iterator[Examples]:
    """Yield the examples of a dataset's files in `folder`, in file order, in batches.

    Raises DataError for a file that is missing, empty, broken, truncated or of another format, and for one
    in which two columns hold the same texts.
    """
    paths = [folder / name for name in dataset.file_names]
    for path in paths:
        require_kind(path, dataset.format)
    if dataset.format == "oasst1":
        yield from oasst1.read(paths, dataset.conversations or ConversationsSpec())
        return
    assert dataset.columns is not None, "DatasetSpec ensures it"
    for path in paths:
        yield from _require_distinct_columns(path, _READERS[dataset.format](path, dataset.columns))


def _require_distinct_columns(path: Path, batches: Iterator[Examples]) -> Iterator[Examples]:
    """Yield the same batches. Raises DataError after the last if two columns were the same in every row."""
    rows, alike = 0, list(_PAIRS)
    shown: dict[str, tuple[str, str]] = {}
    for examples in batches:
        if alike and len(examples.rows):
            rows += len(examples.rows)
            alike = [(one, other) for one, other in alike if _is_same(getattr(examples, one), getattr(examples, other))]
            shown = shown or {one: (getattr(examples.fields, one), getattr(examples, one)[0].as_py()) for one in _TEXTS}
        yield examples
    if rows and alike:
        (one, text), (other, _) = (shown[name] for name in alike[0])
        raise DataError(
            f"{path}: columns {one} and {other}: hold the same text in each of {rows} rows, found {excerpt(text)!r}; "
            f"set columns to those with the {alike[0][0]} and the {alike[0][1]}"
        )


def _is_same(one: pa.StringArray, other: pa.StringArray) -> bool:
    return bool(numpy_flags(pc.equal(pc.utf8_trim_whitespace(one), pc.utf8_trim_whitespace(other))).all())
