"""Combining: the shuffled union of splits that are as they were written."""

from pathlib import Path

import pytest

from fedsft_assets.data.combine import combine
from fedsft_assets.data.quality import prompt_overlap
from fedsft_assets.data.records import DataError, Record, read_records
from fedsft_assets.data.split_report import SplitReport
from fedsft_assets.data.splits import split_dataset
from fedsft_assets.files import folder_digest
from fedsft_assets.specs.dataset import DatasetSpec
from fedsft_assets.specs.limits import SplitSettings
from fedsft_assets.store import SPLITS, split_file
from fedsft_assets_tests.data.conftest import Row, WriteDolly
from fedsft_assets_tests.shipped import DATASETS


def _rows(numbers: range) -> list[Row]:
    return [{"instruction": f"What is {n} plus one?", "response": f"{n + 1}"} for n in numbers]


def _records(folder: Path, split: str) -> list[tuple[str, str]]:
    return [(record["input"], record["output"]) for record in read_records(split_file(folder, split))]


@pytest.fixture
def processed(source: Path, tmp_path: Path) -> list[Path]:
    """The splits of the embedded sample's datasets."""
    folders = [tmp_path / "processed" / name for name in DATASETS]
    for dataset, folder in zip(DATASETS.values(), folders, strict=True):
        split_dataset(dataset, source / dataset.folder, folder)
    return folders


def test_combined_is_the_union_of_the_same_splits(processed: list[Path], tmp_path: Path) -> None:
    report = combine(processed, tmp_path / "combined")
    for split in SPLITS:
        union = {record for folder in processed for record in _records(folder, split)}
        combined = _records(tmp_path / "combined", split)
        assert set(combined) == union
        assert len(combined) == len(union) == report.counts[split]
    assert report == SplitReport.read(tmp_path / "combined")
    assert report.rows == sum(SplitReport.read(folder).records for folder in processed)


def test_the_order_is_shuffled_and_follows_from_content_and_seed(
    processed: list[Path], source: Path, tmp_path: Path
) -> None:
    digest = combine(processed, tmp_path / "combined").digest
    assert combine(processed[::-1], tmp_path / "again").digest == digest
    alpaca = set(_records(processed[0], "training"))
    combined = _records(tmp_path / "combined", "training")
    half = sum(record in alpaca for record in combined[: len(combined) // 2])
    assert half / len(alpaca) == pytest.approx(0.5, abs=0.1)
    for dataset, folder in zip(DATASETS.values(), processed, strict=True):
        split_dataset(dataset, source / dataset.folder, folder, SplitSettings(seed=7))
    assert combine(processed, tmp_path / "other").digest != digest


def test_new_records_do_not_change_the_order_of_the_others(processed: list[Path], tmp_path: Path) -> None:
    combine(processed[:2], tmp_path / "two")
    combine(processed, tmp_path / "three")
    two, three = (_records(tmp_path / name, "training") for name in ("two", "three"))
    assert [record for record in three if record in set(two)] == two


def test_what_two_datasets_share_is_dropped_and_counted(
    dolly: DatasetSpec, write_dolly: WriteDolly, tmp_path: Path
) -> None:
    split_dataset(dolly, write_dolly(_rows(range(200))), tmp_path / "one")
    split_dataset(dolly, write_dolly(_rows(range(150, 400))), tmp_path / "two")
    report = combine([tmp_path / "one", tmp_path / "two"], tmp_path / "combined")
    assert (report.records, report.rows, report.duplicates) == (400, 450, 50)


@pytest.mark.parametrize("spoil", ["missing", "changed", "no report"])
def test_a_split_that_is_not_as_it_was_written_is_named_and_what_was_there_stays(
    processed: list[Path], tmp_path: Path, spoil: str
) -> None:
    into = tmp_path / "combined"
    combine(processed, into)
    before = folder_digest(into)
    path = split_file(processed[1], "validation")
    if spoil == "missing":
        path.unlink()
        message = rf"{path}: cannot be read: No such file.*; materialize the asset again"
    elif spoil == "changed":
        path.write_bytes(path.read_bytes().replace(b"e", b"E", 1))
        message = rf"{path}: has changed since it was written; materialize processed/dolly again"
    else:
        (processed[1] / "report.json").unlink()
        message = rf"{processed[1]}/report\.json: cannot be read: No such file"
    with pytest.raises(DataError, match=message):
        combine(processed, into)
    assert folder_digest(into) == before


@pytest.mark.parametrize("field", ["seed", "proportions"])
def test_datasets_that_were_split_in_different_ways_are_refused(
    processed: list[Path], source: Path, tmp_path: Path, field: str
) -> None:
    other = SplitSettings(**{field: {"seed": 7, "proportions": (0.7, 0.2, 0.1)}[field]})  # type: ignore[arg-type]
    dataset = DATASETS["oasst1"]
    split_dataset(dataset, source / dataset.folder, processed[2], other)
    with pytest.raises(DataError, match=rf"oasst1: was split with {field} .* so a prompt may be in several splits"):
        combine(processed, tmp_path / "combined")


def test_long_and_short_lines_come_through_as_they_are(
    dolly: DatasetSpec, write_dolly: WriteDolly, tmp_path: Path
) -> None:
    rows: list[Row] = [{"instruction": f"{n}? \u2028\r\x85", "response": "é" * (1 + n * 400)} for n in range(300)]
    split_dataset(dolly, write_dolly(rows), tmp_path / "one")
    combine([tmp_path / "one"], tmp_path / "combined")
    records = [record for split in SPLITS for record in read_records(split_file(tmp_path / "combined", split))]
    expected = [Record(input=row["instruction"] or "", output=row["response"] or "") for row in rows]
    assert sorted(records, key=lambda record: record["input"]) == sorted(expected, key=lambda record: record["input"])


def test_dataset_for_testing_alone_is_in_no_split_but_the_testing_one(
    processed: list[Path], dolly: DatasetSpec, write_dolly: WriteDolly, tmp_path: Path
) -> None:
    own = dolly.model_copy(update={"name": "mine", "use": "testing"})
    report = split_dataset(own, write_dolly(_rows(range(40))), tmp_path / "mine")
    assert report.counts == {"training": 0, "validation": 0, "testing": 40}
    before = combine(processed, tmp_path / "combined")
    after = combine([*processed, tmp_path / "mine"], tmp_path / "with mine")
    for split in ("training", "validation"):
        assert after.files[f"{split}.jsonl"] == before.files[f"{split}.jsonl"]
    assert set(_records(tmp_path / "with mine", "testing")) == {
        *_records(tmp_path / "combined", "testing"),
        *_records(tmp_path / "mine", "testing"),
    }


def test_testing_records_that_others_train_on_are_found(source: Path, dolly: DatasetSpec, tmp_path: Path) -> None:
    """A copy of a dataset is no test set for models that train on it."""
    copied = dolly.model_copy(update={"name": "mine", "use": "testing"})
    for dataset in (dolly, copied):
        split_dataset(dataset, source / dolly.folder, tmp_path / dataset.name)
    combine([tmp_path / "dolly", tmp_path / "mine"], tmp_path / "combined")
    assert prompt_overlap([tmp_path / name for name in ("dolly", "mine", "combined")]).count > 0
