"""Where the tests of data find real rows, and a dataset that they can fill."""

from collections.abc import Callable, Iterable
from pathlib import Path

import orjson
import pytest

from fedsft_assets.specs.dataset import DatasetSpec
from fedsft_assets_tests.shipped import DATASETS

Row = dict[str, str | None]
WriteDolly = Callable[[Iterable[Row]], Path]


@pytest.fixture
def dolly() -> DatasetSpec:
    return DATASETS["dolly"]


@pytest.fixture
def write_dolly(tmp_path: Path, dolly: DatasetSpec) -> WriteDolly:
    """Writes these rows as Dolly's file and returns its folder; a row may lack the context."""

    def write(rows: Iterable[Row]) -> Path:
        folder = tmp_path / "source" / dolly.folder
        folder.mkdir(parents=True, exist_ok=True)
        lines = (orjson.dumps({"context": "", "category": "open_qa", **row}) for row in rows)
        (folder / dolly.file_names[0]).write_bytes(b"\n".join(lines))
        return folder

    return write
