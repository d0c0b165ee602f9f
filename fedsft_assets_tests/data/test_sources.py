"""Sources: what is fetched, how it is named, and what stays when a source is unusable."""

from pathlib import Path
from shutil import copytree

import pytest

from fedsft_assets.data.records import DataError
from fedsft_assets.data.sources import DATASETS, Dataset, fetch, source_digest
from fedsft_assets.store import folder_digest
from fedsft_assets_tests.data.conftest import Row, WriteDolly

_EVERY_DATASET = pytest.mark.parametrize("dataset", DATASETS.values(), ids=list(DATASETS))


def test_datasets_come_in_their_order_under_their_own_names() -> None:
    assert [(name, dataset.name) for name, dataset in DATASETS.items()] == [
        ("alpaca", "alpaca"),
        ("dolly", "dolly"),
        ("oasst1", "oasst1"),
    ]


@_EVERY_DATASET
def test_the_sample_has_one_digest_before_and_after_fetching(dataset: Dataset, tmp_path: Path) -> None:
    report = fetch(dataset, None, tmp_path / "raw")
    assert report.digest == source_digest(dataset, None) == folder_digest(tmp_path / "raw")
    assert report.files == len(dataset.files)
    assert report.rows > 600


@_EVERY_DATASET
def test_a_published_folder_is_fetched_as_it_is(dataset: Dataset, real_samples: Path, tmp_path: Path) -> None:
    report = fetch(dataset, real_samples, tmp_path / "raw")
    assert report.digest == source_digest(dataset, real_samples) == folder_digest(tmp_path / "raw")
    # Rows as shared/data/README.md counts them; oasst1's are messages.
    assert report.rows == {"alpaca": 700, "dolly": 112, "oasst1": 684 + 113}[dataset.name]
    for name in dataset.files:
        assert (tmp_path / "raw" / name).read_bytes() == (real_samples / dataset.folder / name).read_bytes()


def test_other_files_beside_the_data_are_neither_fetched_nor_part_of_the_digest(
    dolly: Dataset, write_dolly: WriteDolly, tmp_path: Path
) -> None:
    folder = write_dolly([{"instruction": "a", "response": "b"}])
    before = source_digest(dolly, folder.parent)
    (folder / "README.md").write_text("the dataset card")
    assert fetch(dolly, folder.parent, tmp_path / "raw").digest == source_digest(dolly, folder.parent) == before
    assert [path.name for path in (tmp_path / "raw").iterdir()] == list(dolly.files)


def test_a_new_row_changes_the_digest(dolly: Dataset, write_dolly: WriteDolly) -> None:
    row: Row = {"instruction": "a", "response": "b"}
    first = source_digest(dolly, write_dolly([row]).parent)
    assert source_digest(dolly, write_dolly([row, row]).parent) != first


def test_an_unusable_source_leaves_what_was_fetched_before(
    dolly: Dataset, write_dolly: WriteDolly, tmp_path: Path
) -> None:
    good = write_dolly([{"instruction": "a", "response": "b"}])
    into = tmp_path / "raw"
    digest = fetch(dolly, good.parent, into).digest
    path = good / dolly.files[0]
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(
        DataError, match=r"source/databricks-dolly-15k/databricks-dolly-15k\.jsonl: line 1: is not JSON"
    ):
        fetch(dolly, good.parent, into)
    assert folder_digest(into) == digest
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".raw")] == []


def test_a_source_without_the_dataset_says_what_is_there(dolly: Dataset, real_samples: Path, tmp_path: Path) -> None:
    copytree(real_samples / "alpaca", tmp_path / "alpaca")
    for ask in (lambda: source_digest(dolly, tmp_path), lambda: fetch(dolly, tmp_path, tmp_path / "raw")):
        with pytest.raises(DataError, match=r"has no folder databricks-dolly-15k .* found alpaca; put the files of"):
            ask()


def test_a_source_with_nothing_to_learn_from_is_refused(
    dolly: Dataset, write_dolly: WriteDolly, tmp_path: Path
) -> None:
    folder = write_dolly([])
    (folder / dolly.files[0]).write_text("\n\n")
    with pytest.raises(DataError, match="holds no example of Databricks Dolly 15k"):
        fetch(dolly, folder.parent, tmp_path / "raw")
