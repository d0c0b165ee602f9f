"""The Alpaca format: one Parquet file with instruction, optional input, and output in a row.

Source of the format: https://huggingface.co/datasets/tatsu-lab/alpaca
"""

from collections.abc import Iterator
from pathlib import Path

from fedsft_assets.data.records import Example
from fedsft_assets.data.tables import parquet_texts

FILES = ("data/train-00000-of-00001-a09b74b3ef9c3b56.parquet",)


def read(folder: Path) -> Iterator[Example]:
    """The examples in the file's order; the column `input` is the context.

    Raises DataError for a file that is missing, broken or of another format.
    """
    for name in FILES:
        yield from map(Example._make, parquet_texts(folder / name, ("instruction", "input", "output")))
