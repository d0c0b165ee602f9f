"""Sources: what is fetched, how it is named, and what stays when a source is unusable."""

from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedsft_assets.data.records import DataError
from fedsft_assets.data.sources.fetch import FetchReport, fetch, source_version
from fedsft_assets.files import folder_digest
from fedsft_assets.specs.dataset import ColumnsSpec, DatasetSpec
from fedsft_assets_tests.data.conftest import Row, WriteDolly
from fedsft_assets_tests.data.hub_server import HubServer
from fedsft_assets_tests.shipped import DATASETS

_EVERY_DATASET = pytest.mark.parametrize("dataset", DATASETS.values(), ids=list(DATASETS))

Bring = Callable[..., FetchReport]


@pytest.fixture
def bring(tmp_path: Path) -> Bring:
    """Fetches into `raw` of the test's folder."""

    def bring_dataset(dataset: DatasetSpec, source: str | Path) -> FetchReport:
        return fetch(dataset, str(source), tmp_path / "raw", tmp_path / "downloads")

    return bring_dataset


@_EVERY_DATASET
def test_the_sample_has_one_digest_before_and_after_fetching(
    dataset: DatasetSpec, bring: Bring, tmp_path: Path
) -> None:
    report = bring(dataset, "sample")
    assert report.version == report.digest == source_version(dataset, "sample") == folder_digest(tmp_path / "raw")
    assert report.files == len(dataset.file_names)
    assert report.rows > 600


@_EVERY_DATASET
def test_a_published_folder_is_fetched_as_it_is(
    dataset: DatasetSpec, bring: Bring, real_samples: Path, tmp_path: Path
) -> None:
    report = bring(dataset, real_samples)
    assert report.digest == source_version(dataset, str(real_samples)) == folder_digest(tmp_path / "raw")
    # Rows as shared/data/README.md counts them; oasst1's are messages.
    assert report.rows == {"alpaca": 700, "dolly": 112, "oasst1": 684 + 113}[dataset.name]
    for name in dataset.file_names:
        assert (tmp_path / "raw" / name).read_bytes() == (real_samples / dataset.folder / name).read_bytes()


@_EVERY_DATASET
def test_the_hub_brings_the_published_files_of_the_pinned_commit(
    dataset: DatasetSpec, bring: Bring, real_samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dataset.hub
    with HubServer({dataset.hub: real_samples / dataset.folder}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        report = bring(dataset, "hub")
    assert report.version == source_version(dataset, "hub") == f"{dataset.hub}@{dataset.revision}"
    assert report.digest == folder_digest(tmp_path / "raw")
    for name in dataset.file_names:
        assert (tmp_path / "raw" / name).read_bytes() == (real_samples / dataset.folder / name).read_bytes()


def test_a_hub_file_of_another_dataset_leaves_what_was_fetched_before(
    dolly: DatasetSpec, write_dolly: WriteDolly, bring: Bring, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = bring(dolly, "sample").digest
    folder = write_dolly([])
    (folder / dolly.file_names[0]).write_text('{"question": "a", "answer": "b"}\n')
    assert dolly.hub
    with HubServer({dolly.hub: folder}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        with pytest.raises(DataError, match="field instruction: is missing in every row, found question, answer"):
            bring(dolly, "hub")
    assert folder_digest(tmp_path / "raw") == digest


def test_other_files_beside_the_data_are_neither_fetched_nor_part_of_the_version(
    dolly: DatasetSpec, write_dolly: WriteDolly, bring: Bring, tmp_path: Path
) -> None:
    folder = write_dolly([{"instruction": "a", "response": "b"}])
    before = source_version(dolly, str(folder.parent))
    (folder / "README.md").write_text("the dataset card")
    assert bring(dolly, folder.parent).digest == source_version(dolly, str(folder.parent)) == before
    assert [path.name for path in (tmp_path / "raw").iterdir()] == dolly.file_names


def test_a_new_row_changes_the_version(dolly: DatasetSpec, write_dolly: WriteDolly) -> None:
    row: Row = {"instruction": "a", "response": "b"}
    first = source_version(dolly, str(write_dolly([row]).parent))
    assert source_version(dolly, str(write_dolly([row, row]).parent)) != first


def test_an_unusable_source_leaves_what_was_fetched_before(
    real_samples: Path, source: Path, bring: Bring, tmp_path: Path
) -> None:
    alpaca = DATASETS["alpaca"]
    digest = bring(alpaca, real_samples).digest
    path = source / alpaca.folder / alpaca.file_names[0]
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DataError, match=rf"{path}: is not a complete Parquet file"):
        bring(alpaca, source)
    assert folder_digest(tmp_path / "raw") == digest
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".raw")] == []


def test_a_source_without_the_dataset_says_what_is_there(
    dolly: DatasetSpec, real_samples: Path, bring: Bring, tmp_path: Path
) -> None:
    place = tmp_path / "data"
    copytree(real_samples / "alpaca", place / "alpaca")
    for ask in (lambda: source_version(dolly, str(place)), lambda: bring(dolly, place)):
        with pytest.raises(DataError, match=r"has no folder databricks-dolly-15k .* found alpaca; put the files of"):
            ask()


def test_a_missing_file_is_named(bring: Bring, source: Path) -> None:
    oasst1 = DATASETS["oasst1"]
    missing = source / oasst1.folder / oasst1.file_names[1]
    missing.unlink()
    with pytest.raises(DataError, match=rf"{missing}: is missing; put the files of OpenAssistant/oasst1 there"):
        bring(oasst1, source)


def test_a_source_with_nothing_to_learn_from_is_refused(
    dolly: DatasetSpec, write_dolly: WriteDolly, bring: Bring
) -> None:
    folder = write_dolly([])
    (folder / dolly.file_names[0]).write_text("\n\n")
    with pytest.raises(DataError, match=r"databricks-dolly-15k\.jsonl: field instruction: is missing in every row"):
        bring(dolly, folder.parent)
    (folder / dolly.file_names[0]).write_text("")
    with pytest.raises(DataError, match=r"databricks-dolly-15k\.jsonl: is empty"):
        bring(dolly, folder.parent)


@pytest.mark.parametrize("source", ["sample", "hub"])
def test_a_dataset_of_the_users_comes_from_its_path_whatever_the_source(
    bring: Bring, tmp_path: Path, source: str
) -> None:
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.table({"q": ["a?"], "a": ["b"]}), path)
    mine = DatasetSpec(name="mine", path=path, format="parquet", columns=ColumnsSpec(instruction="q", response="a"))
    assert bring(mine, source).digest == source_version(mine, source)
    assert (tmp_path / "raw" / "mine.parquet").read_bytes() == path.read_bytes()
    path.unlink()
    with pytest.raises(DataError, match=r"mine\.parquet: is missing; correct path or files in datasets/mine\.yaml"):
        bring(mine, source)
