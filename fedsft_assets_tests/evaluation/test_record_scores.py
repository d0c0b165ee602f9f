"""Which records of the combined testing split are whose, and what becomes of the losses of several models."""

from pathlib import Path

import pandas as pd
import pytest

from fedsft_assets.data.combine import combine
from fedsft_assets.data.records import DataError, Record, dump_records, read_records
from fedsft_assets.data.split_report import SplitReport
from fedsft_assets.evaluation.matrix import gains, loss_matrix
from fedsft_assets.evaluation.record_scores import common_records, scored_records
from fedsft_assets.files import file_digest
from fedsft_assets.specs.limits import SplitSettings
from fedsft_assets.store import SPLITS, Store, split_file
from fedsft_assets.versions import adding

SHARED = Record(input="What is shared?", output="this")
RECORDS = {
    "alpaca": [SHARED, Record(input="Who are you?", output="alpaca"), Record(input="who  ARE you?", output="another")],
    "dolly": [Record(input="A\rB?", output="dolly"), SHARED],
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path)
    for dataset, records in RECORDS.items():
        with adding(store.processed(dataset)) as addition:
            for split in SPLITS:
                split_file(addition.folder, split).write_bytes(dump_records(records))
            files = {path.name: file_digest(path) for path in addition.folder.iterdir()}
            counts = dict.fromkeys(SPLITS, len(records))
            SplitReport.of(dataset, files, SplitSettings(), counts, rows=9, duplicates=0).write(addition.folder)
    return store


@pytest.fixture
def combined(store: Store) -> Path:
    versions = [next(path for path in store.processed(dataset).iterdir() if path.is_dir()) for dataset in RECORDS]
    with adding(store.combined) as addition:
        combine(versions, addition.folder)
    return addition.version


def test_each_record_is_in_its_datasets_and_once_in_the_combined_split(store: Store, combined: Path) -> None:
    table = scored_records(store, combined)
    records = read_records(split_file(combined, "testing"))
    assert sorted(table["row"].unique()) == list(range(4))
    assert table["first"].sum() == len(records) == 4
    of = {name: [records[row] for row in group["row"]] for name, group in table.groupby("dataset")}
    for dataset, expected in RECORDS.items():
        assert sorted(of[dataset], key=str) == sorted(expected, key=str)
    assert table["record"].nunique() == 4
    assert table["prompt"].nunique() == 3  # two are equal but for case and white space


def test_a_part_of_the_records_is_the_first_of_the_combined_split(store: Store, combined: Path) -> None:
    whole, part = scored_records(store, combined), scored_records(store, combined, 2)
    pd.testing.assert_frame_equal(part, whole[whole["row"] < 2])


def test_splits_that_the_combined_one_was_not_made_of_are_named(store: Store, combined: Path) -> None:
    version = next(path for path in store.processed("dolly").iterdir() if path.is_dir())
    split_file(version, "testing").write_bytes(dump_records([SHARED]))
    with pytest.raises(DataError, match=rf"{combined}: its testing split has records of no dataset; materialize"):
        scored_records(store, combined)


def _losses(model: str, losses: list[float]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "model": model,
            "dataset": ["alpaca", "alpaca", "dolly"],
            "record": ["a", "b", "a"],
            "prompt": ["p", "q", "p"],
            "first": [True, True, False],
            "tokens": [10, 30, 10],
            "loss": losses,
        }
    )


def test_matrix_has_mean_losses_by_tokens_on_each_dataset_and_on_all_records_once() -> None:
    losses = pd.concat([_losses("base_model", [20.0, 90.0, 20.0]), _losses("fedavg", [10.0, 30.0, 10.0])])
    matrix = loss_matrix(losses)
    assert list(matrix.index) == ["base_model", "fedavg"]
    assert list(matrix.columns) == ["combined", "alpaca", "dolly"]
    assert matrix.loc["base_model"].tolist() == [110 / 40, 110 / 40, 2.0]
    assert matrix.loc["fedavg"].tolist() == [1.0, 1.0, 1.0]
    assert gains(matrix, over="base_model").loc["fedavg"].tolist() == [1.75, 1.75, 1.0]


def test_models_are_compared_on_records_that_all_were_scored_on() -> None:
    whole, part = _losses("base_model", [20.0, 90.0, 20.0]), _losses("fedavg", [10.0, 30.0, 10.0])
    losses = common_records(pd.concat([whole, part[part["record"] == "a"]]).assign(seed=None))
    assert losses["record"].unique().tolist() == ["a"]
    assert loss_matrix(losses)["combined"].tolist() == [2.0, 1.0]
