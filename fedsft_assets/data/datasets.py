"""Datasets by their specs: how the files of one are read, whatever their format."""

from collections.abc import Iterator
from pathlib import Path

from fedsft_assets.data import csv_files, json_files, oasst1, parquet
from fedsft_assets.data.examples import Examples
from fedsft_assets.data.records import DataError
from fedsft_assets.specs import ConversationsSpec, DatasetSpec

_READERS = {
    "parquet": parquet.read,
    "jsonl": json_files.read_lines,
    "json": json_files.read_array,
    "csv": csv_files.read,
}


def read_examples(dataset: DatasetSpec, folder: Path) -> Iterator[Examples]:
    """The examples of a dataset's files in a folder, in the files' order, in batches.

    Raises DataError for a file that is missing, empty, broken or of another format.
    """
    paths = [folder / name for name in dataset.file_names]
    for path in paths:
        _require(path)
    if dataset.format == "oasst1":
        yield from oasst1.read(paths, dataset.conversations or ConversationsSpec())
        return
    assert dataset.columns is not None, "DatasetSpec sees to it"
    for path in paths:
        yield from _READERS[dataset.format](path, dataset.columns)


def _require(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"{path}: is missing; put the file there as published")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: is empty; download it again")
