"""The tables that a notebook gets from a home."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from fedsft_assets.evaluation.record_scores import LOSSES_FILE, Evaluation
from fedsft_assets.evaluation.tables import Tables
from fedsft_assets.store import Store
from fedsft_assets.versions import NoVersionError, adding, make_current
from fedsft_assets_tests.federation.protocol.test_job_report import REPORT


@pytest.fixture
def home(tmp_path: Path) -> Path:
    store = Store(tmp_path)
    for model, loss in (("base_model", 7.0), ("fedavg", 1.0)):
        with adding(store.evaluation(model)) as addition:
            Evaluation(model, "a" * 64, "t" * 64, 256).write(addition.folder)
            row = {"dataset": "dolly", "record": "a", "prompt": "p", "first": True, "tokens": 10, "loss": 10 * loss}
            pd.DataFrame([row]).to_parquet(addition.folder / LOSSES_FILE)
        make_current(addition.version)
    with adding(store.checkpoint("fedavg")) as addition:
        replace(REPORT, job="fedavg").write(addition.folder)
    make_current(addition.version)
    return tmp_path


def test_losses_and_matrix_are_of_current_evaluations(home: Path) -> None:
    tables = Tables(home)
    assert tables.losses()["model"].tolist() == ["base_model", "fedavg"]
    assert tables.matrix()["combined"].to_dict() == {"base_model": 7.0, "fedavg": 1.0}


def test_curves_and_budgets_are_of_current_checkpoints(home: Path) -> None:
    tables = Tables(str(home))
    curves = tables.curves()
    assert curves["val_loss"].tolist() == REPORT.val_loss
    assert curves["records"].tolist() == REPORT.samples
    assert curves["validation_split"].unique().tolist() == [REPORT.validation_digest]
    (budget,) = tables.budgets().to_dict("records")
    assert budget == {
        "job": "fedavg",
        "kind": REPORT.kind,
        "seed": 1234,
        "rounds": REPORT.rounds,
        "steps": REPORT.steps,
        "tokens": REPORT.tokens,
        "records": REPORT.samples[-1],
        "bytes_up": 8_000_001,
        "bytes_down": 12_000_002,
        "seconds": REPORT.seconds,
        "cpu_seconds": REPORT.cpu_seconds,
        "peak_memory": REPORT.peak_memory,
    }
    assert curves["bytes"].tolist() == REPORT.transferred
    assert curves["seconds"].tolist() == REPORT.elapsed


def test_traffic_is_that_of_each_site(home: Path) -> None:
    assert Tables(home).traffic().to_numpy().tolist() == [
        ["fedavg", 1234, "site-1", 8_000_000, 12_000_000],
        ["fedavg", 1234, "site-2", 1, 2],
    ]


def test_home_without_evaluations_says_what_to_do(tmp_path: Path) -> None:
    tables = Tables(tmp_path)
    assert tables.curves().empty
    assert tables.budgets().empty
    with pytest.raises(NoVersionError, match="has no evaluation; materialize evaluation/base_model"):
        tables.matrix()
