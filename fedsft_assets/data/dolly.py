"""The Dolly format: one JSONL file with instruction, optional context, response and category in a line.

Source of the format: https://huggingface.co/datasets/databricks/databricks-dolly-15k
"""

from collections.abc import Iterator
from pathlib import Path

from fedsft_assets.data.records import Example
from fedsft_assets.data.tables import json_lines_texts

FILES = ("databricks-dolly-15k.jsonl",)


def read(folder: Path) -> Iterator[Example]:
    """The examples in the file's order; the category is not used.

    Raises DataError for a file that is missing, broken or of another format.
    """
    for name in FILES:
        yield from map(Example._make, json_lines_texts(folder / name, ("instruction", "context", "response")))
