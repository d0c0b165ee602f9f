"""raw, processed and combined as Dagster materializes them: what they show, and what stays when they fail."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from fedsft_assets.data.records import read_records
from fedsft_assets.defs.assets.raw import raw_asset
from fedsft_assets.defs.assets.splits import combined_asset, processed_asset
from fedsft_assets.defs.checks import data_checks
from fedsft_assets.defs.resources import resources
from fedsft_assets.files import folder_digest
from fedsft_assets.settings import PROJECT, Settings
from fedsft_assets.specs.dataset import DatasetSpec
from fedsft_assets.specs.limits import SplitSettings
from fedsft_assets.store import SPLITS, Store, split_file
from fedsft_assets.versions import current
from fedsft_assets_tests.shipped import DATASETS

Materialize = Callable[..., dg.ExecuteInProcessResult]

_MINE = """
title: Questions of ours
path: ../questions.csv
columns: {instruction: question, response: answer}
"""


def _write_questions(path: Path, count: int, blank: int = 0) -> None:
    rows = [f"What is {n} and {n}?,It is {2 * n}." for n in range(count)] + [f"And {n}?," for n in range(blank)]
    path.write_text("\n".join(["question,answer", *rows]), encoding="utf-8")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def materialize(store: Store, source: Path) -> Materialize:
    """Materializes the data assets of these datasets into the test's store."""

    def run(datasets: Mapping[str, DatasetSpec], fails: bool = False, **settings: Any) -> dg.ExecuteInProcessResult:
        specs = list(datasets.values())
        assets = [*map(raw_asset, specs), *map(processed_asset, specs), combined_asset(specs)]
        given = resources(Settings(home=store.home, data=str(source), **settings))
        return dg.materialize([*assets, *data_checks(specs)], resources=given, raise_on_error=not fails)

    return run


@pytest.fixture
def mine(tmp_path: Path) -> DatasetSpec:
    """A dataset of the user's: one YAML file and one CSV file."""
    (tmp_path / "datasets").mkdir()
    path = tmp_path / "datasets" / "mine.yaml"
    path.write_text(_MINE, encoding="utf-8")
    _write_questions(tmp_path / "questions.csv", 200)
    return DatasetSpec.load(path)


def _metadata(result: dg.ExecuteInProcessResult, *key: str) -> dict[str, Any]:
    for event in result.get_asset_materialization_events():
        if event.asset_key == dg.AssetKey(key):
            return {
                name: value.value for name, value in event.step_materialization_data.materialization.metadata.items()
            }
    raise AssertionError(f"{key} was not materialized")


def test_every_asset_shows_what_it_holds(materialize: Materialize, store: Store) -> None:
    result = materialize(DATASETS)
    for key in (("raw", "dolly"), ("processed", "dolly"), ("combined",)):
        header, _, *rows = _metadata(result, *key)["preview"].splitlines()
        assert header == "| input | output |"
        assert len(rows) == 5
    for key, folder in (
        (("processed", "oasst1"), current(store.processed("oasst1"))),
        (("combined",), current(store.combined)),
    ):
        shown = _metadata(result, *key)
        written = {split: len(read_records(split_file(folder, split))) for split in SPLITS}
        assert {split: shown[split] for split in SPLITS} == written
        assert shown["records"] == shown["dagster/row_count"] == sum(written.values())
        assert 0 < shown["tokens, p50"] < shown["tokens, p95"] < shown["tokens, p99"] <= shown["tokens, max"]
        assert shown["token lengths"].startswith(f"![{key[-1]}-")
    assert _metadata(result, "processed", "alpaca")["rejected"] == 2
    assert _metadata(result, "processed", "alpaca")["duplicates"] == 3


def test_a_dataset_of_the_users_is_split_like_all_others(
    materialize: Materialize, mine: DatasetSpec, store: Store
) -> None:
    result = materialize({**DATASETS, "mine": mine})
    assert _metadata(result, "raw", "mine")["dagster/row_count"] == 200
    assert _metadata(result, "processed", "mine")["records"] == 200
    assert _metadata(result, "combined")["rows"] == sum(
        _metadata(result, "processed", name)["records"] for name in (*DATASETS, "mine")
    )
    combined = read_records(split_file(current(store.combined), "training"))
    mine_only = read_records(split_file(current(store.processed("mine")), "training"))
    assert {record["input"] for record in mine_only} <= {record["input"] for record in combined}


def test_too_many_bad_rows_fail_the_asset_with_what_to_do_and_what_was_there_stays(
    materialize: Materialize, mine: DatasetSpec, store: Store, tmp_path: Path
) -> None:
    materialize({"mine": mine})
    before = folder_digest(current(store.processed("mine")))
    _write_questions(tmp_path / "questions.csv", 200, blank=10)
    result = materialize({"mine": mine}, fails=True)
    assert not result.success
    (failure,) = result.get_step_failure_events()
    said = failure.step_failure_data.user_failure_data
    assert said is not None
    assert said.description is not None
    assert said.description.startswith("mine: 10 of 210 rows cannot be used, more than the allowed share of 1.00%")
    assert f"all are in {store.home}/processed/mine.rejected.jsonl" in said.description
    assert folder_digest(current(store.processed("mine"))) == before
    result = materialize({"mine": mine}, splits=SplitSettings(max_rejected=0.1))
    assert _metadata(result, "processed", "mine")["rejected"] == 10


def test_how_records_are_split_is_set_once_for_all(materialize: Materialize, store: Store) -> None:
    materialize(DATASETS, splits=SplitSettings(proportions=(0.5, 0.25, 0.25)))
    for folder in map(current, (*map(store.processed, DATASETS), store.combined)):
        counts = [len(read_records(split_file(folder, split))) for split in SPLITS]
        assert counts[0] / sum(counts) == pytest.approx(0.5, abs=0.08)


_GRAPH = """
import json
from fedsft_assets.definitions import defs
graph = defs.resolve_asset_graph()
print("graph:", json.dumps({key.to_user_string(): sorted(p.to_user_string() for p in graph.get(key).parent_keys)
                 for key in graph.get_all_asset_keys()}))
"""


def test_one_yaml_file_makes_a_dataset_and_one_more_makes_it_a_site(mine: DatasetSpec, tmp_path: Path) -> None:
    assert mine.path
    for name in DATASETS:
        (tmp_path / "datasets" / f"{name}.yaml").write_text((PROJECT / "datasets" / f"{name}.yaml").read_text())
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "four.yaml").write_text(
        "description: FedAvg over four sites\nrounds: 2\nsites:\n"
        + "".join(f"  site-{n}: {{dataset: {name}}}\n" for n, name in enumerate((*DATASETS, "mine"), start=1))
    )
    environment = {
        **os.environ,
        "FEDSFT_DATASETS": str(tmp_path / "datasets"),
        "FEDSFT_JOBS": str(tmp_path / "jobs"),
        "FEDSFT_HOME": str(tmp_path / "home"),
    }
    done = subprocess.run(
        [sys.executable, "-c", _GRAPH], env=environment, cwd=PROJECT, capture_output=True, text=True, check=True
    )
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("graph: "))
    graph = json.loads(line.removeprefix("graph: "))
    assert graph["processed/mine"] == ["raw/mine"]
    assert "processed/mine" in graph["combined"]
    assert set(graph["job_folder/four"]) == {
        "base_model",
        "combined",
        *(f"processed/{name}" for name in (*DATASETS, "mine")),
    }
