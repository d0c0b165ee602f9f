"""Files that are broken in ways nobody thought of: either an error that names the file, or nothing."""

import csv
import json
import random
from pathlib import Path
from shutil import copytree

import pytest

from fedsft_assets.data.records import DataError
from fedsft_assets.data.splits import split_dataset
from fedsft_assets.files import folder_digest
from fedsft_assets.specs.dataset import ColumnsSpec, DataFormat, DatasetSpec
from fedsft_assets_tests.shipped import DATASETS

_COPIES = 60


def _break(content: bytes, rng: random.Random) -> bytes:
    """The content with some bytes changed, cut off, put in, blanked, repeated, or replaced by very little."""
    start = rng.randrange(len(content))
    end = min(len(content), start + rng.randrange(1, 5000))
    match rng.randrange(7):
        case 0 | 1:
            changed = bytearray(content)
            for _ in range(rng.choice([1, 3, 30])):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            return bytes(changed)
        case 2:
            return content[:start]
        case 3:
            return content[:start] + rng.randbytes(end - start) + content[start:]
        case 4:
            return content[:start] + bytes(end - start) + content[end:]
        case 5:
            return content[:end] + content[start:]
        case _:
            return rng.choice([b"", b"\n", b"[]", b"{}", b"null", b'"a"', b"PAR1", bytes(50), b"\xff\xfe\x00"])


def _write(path: Path, format: DataFormat) -> DatasetSpec:
    """Three hundred questions in a file of one format."""
    columns = ColumnsSpec(instruction="q", context="c", response="a")
    rows = [{"q": f"What is {n}, é?", "c": f'So "{n}"\n' if n % 2 else "", "a": f"It is {n}."} for n in range(300)]
    with path.open("w", encoding="utf-8", newline="") as file:
        if format == "csv":
            writer = csv.DictWriter(file, ["q", "c", "a"])
            writer.writeheader()
            writer.writerows(rows)
        else:
            json.dump(rows, file, ensure_ascii=False)
    return DatasetSpec(name="mine", path=path, format=format, columns=columns)


@pytest.fixture(params=[*DATASETS, "csv", "json"])
def dataset_and_raw(request: pytest.FixtureRequest, source: Path, tmp_path: Path) -> tuple[DatasetSpec, Path]:
    """A dataset of each format, and the folder of its files."""
    name = request.param
    if name in DATASETS:
        return DATASETS[name], source / DATASETS[name].folder
    (tmp_path / "mine").mkdir()
    return _write(tmp_path / "mine" / f"rows.{name}", name), tmp_path / "mine"


def test_a_broken_file_is_an_error_that_names_it_or_does_no_harm(
    dataset_and_raw: tuple[DatasetSpec, Path], tmp_path: Path
) -> None:
    dataset, raw = dataset_and_raw
    into, rng = tmp_path / "splits", random.Random(f"broken {dataset.format}")
    errors = []
    for copy in range(_COPIES):
        broken = copytree(raw, tmp_path / f"copy-{copy}")
        path = broken / rng.choice(dataset.file_names)
        path.write_bytes(_break(path.read_bytes(), rng))
        before = folder_digest(into) if into.exists() else None
        try:
            split_dataset(dataset, broken, into)
        except DataError as error:
            after = folder_digest(into) if into.exists() else None
            errors.append((path.name, str(error), after == before))
    assert len(errors) > _COPIES / 10
    for name, error, kept in errors:
        assert name in error or "rows cannot be used" in error or "split is empty" in error
        assert kept, error
