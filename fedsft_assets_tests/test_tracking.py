"""Tracking, with a real MLflow over a SQLite store: what a job's MLflow runs hold, and who is champion."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedsft_assets.federation.metrics import Point
from fedsft_assets.federation.report import MODEL_FILE, JobReport
from fedsft_assets.tracking import CHAMPION, EXPERIMENT, TrackedJob, Tracking, register

SITES = ["site-1", "site-2"]
ROUNDS = 2
REPORT = JobReport(
    job="fedavg",
    kind="federated",
    rounds=ROUNDS,
    best_round=1,
    tokens=700,
    samples=[0, 64, 128],
    val_loss=[7.0, 2.0, 2.5],
    test_loss=2.25,
    perplexity=9.4877,
    seconds=12.5,
    phases={"train": 1.0},
    checkpoint_digest="c" * 64,
    base_model_digest="b" * 64,
    validation_digest="v" * 64,
)


@pytest.fixture
def tracking(empty_mlflow_database: Path, tmp_path: Path) -> Tracking:
    shutil.copyfile(empty_mlflow_database, tmp_path / "mlflow.db")
    return Tracking(f"sqlite:///{tmp_path / 'mlflow.db'}", tmp_path / "artifacts")


@pytest.fixture
def open_job(tracking: Tracking) -> Callable[[], TrackedJob]:
    params = {"rounds": ROUNDS, "learning_rate": 4e-3, "max_local_steps": None}
    return lambda: TrackedJob(tracking, "fedavg", SITES, params, {"dagster.run_id": "abc"}, note="FedAvg over two")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / MODEL_FILE).write_text("weights")
    REPORT.write(folder)
    return folder


def _points() -> list[Point]:
    """What a job of two sites and two rounds writes down, in its order: a model is scored when a round ends."""
    points: list[Point] = []
    for k in range(ROUNDS + 1):
        points.append(Point("val_loss", REPORT.val_loss[k], k, 64 * k))
        points += [Point("val_loss", REPORT.val_loss[k], k, 32 * k, site) for site in SITES]
        if k < ROUNDS:
            for step in (1, 2):
                seen = 32 * k + 16 * step
                points += [Point("train_loss", 5 - k - step / 10, k + 1, seen, site, step, 100) for site in SITES]
                points.append(Point("train_loss", 5 - k - step / 10, k + 1, 2 * seen, None, step, 200))
    return points


def _runs(tracking: Tracking) -> dict[str, object]:
    client = tracking.client()
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def _statuses(tracking: Tracking) -> dict[str, str]:
    return {name: run.info.status for name, run in _runs(tracking).items()}  # type: ignore[attr-defined]


def _curve(tracking: Tracking, run_id: str, name: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in tracking.client().get_metric_history(run_id, name))


def test_job_has_one_mlflow_run_with_a_child_for_each_site(
    tracking: Tracking, open_job: Callable[[], TrackedJob]
) -> None:
    job = open_job()
    runs = _runs(tracking)
    assert sorted(runs) == ["fedavg", "fedavg site-1", "fedavg site-2"]
    parent = runs["fedavg"].data  # type: ignore[attr-defined]
    assert parent.params == {"rounds": "2", "learning_rate": "0.004", "max_local_steps": "None"}
    assert (parent.tags["dagster.run_id"], parent.tags["mlflow.note.content"]) == ("abc", "FedAvg over two")
    for site in SITES:
        tags = runs[f"fedavg {site}"].data.tags  # type: ignore[attr-defined]
        assert (tags["mlflow.parentRunId"], tags["site"], tags["dagster.run_id"]) == (job.run_id, site, "abc")
    assert set(_statuses(tracking).values()) == {"RUNNING"}


def test_curves_share_the_axis_of_records_trained_on(tracking: Tracking, open_job: Callable[[], TrackedJob]) -> None:
    with open_job() as job:
        for point in _points():
            job.log(point)
        job.flush()
    assert _curve(tracking, job.run_id, "val_loss") == list(zip(REPORT.samples, REPORT.val_loss, strict=True))
    assert _curve(tracking, job.run_id, "round") == [(0, 0), (64, 1), (128, 2)]
    assert _curve(tracking, job.run_id, "train_loss") == [(32, 4.9), (64, 4.8), (96, 3.9), (128, 3.8)]
    for site in SITES:
        child = _runs(tracking)[f"fedavg {site}"].info.run_id  # type: ignore[attr-defined]
        assert _curve(tracking, child, "val_loss") == [(0, 7.0), (32, 2.0), (64, 2.5)]
        assert _curve(tracking, child, "train_loss") == [(16, 4.9), (32, 4.8), (48, 3.9), (64, 3.8)]
        assert _curve(tracking, job.run_id, f"val_loss.{site}") == [(0, 7.0), (32, 2.0), (64, 2.5)]
        assert _curve(tracking, job.run_id, f"train_loss.{site}") == []


def test_a_round_is_in_mlflow_while_the_job_runs(tracking: Tracking, open_job: Callable[[], TrackedJob]) -> None:
    job = open_job()
    job.log(Point("train_loss", 3.0, 1, 16, "site-1", 1, 100))
    assert _curve(tracking, job.run_id, "val_loss") == []
    job.log(Point("val_loss", 2.0, 1, 32))
    assert _curve(tracking, job.run_id, "val_loss") == [(32, 2.0)]
    child = _runs(tracking)["fedavg site-1"].info.run_id  # type: ignore[attr-defined]
    assert _curve(tracking, child, "train_loss") == [(16, 3.0)]


def test_more_points_than_one_call_takes_arrive_once(tracking: Tracking, open_job: Callable[[], TrackedJob]) -> None:
    job = open_job()
    for step in range(1, 1202):
        job.log(Point("train_loss", float(step), 1, step, None, step, 1))
    job.flush()
    job.flush()
    assert _curve(tracking, job.run_id, "train_loss") == [(step, float(step)) for step in range(1, 1202)]


def test_points_that_mlflow_did_not_take_are_kept_for_the_next_time(
    open_job: Callable[[], TrackedJob], tracking: Tracking, tmp_path: Path
) -> None:
    job = open_job()
    database = tmp_path / "mlflow.db"
    job.log(Point("train_loss", 3.0, 1, 16, None, 1, 100))
    content = database.read_bytes()
    database.write_bytes(b"not a database" * 1000)
    with pytest.raises(Exception, match="not a database"):
        job.flush()
    database.write_bytes(content)
    job.flush()
    assert _curve(tracking, job.run_id, "train_loss") == [(16, 3.0)]


def test_finished_job_has_its_results_artifacts_and_status(
    tracking: Tracking, open_job: Callable[[], TrackedJob], checkpoint: Path
) -> None:
    with open_job() as job:
        job.log(Point("train_loss", 3.0, 1, 16, None, 1, 100))
        job.finish(REPORT, checkpoint, artifacts=[checkpoint / "report.json"])
    assert set(_statuses(tracking).values()) == {"FINISHED"}
    run = tracking.client().get_run(job.run_id)
    results = {name: value for name, value in run.data.metrics.items() if name != "train_loss"}
    assert results == {
        "test_loss": 2.25,
        "perplexity": 9.4877,
        "best_val_loss": 2.0,
        "last_val_loss": 2.5,
        "base_val_loss": 7.0,
        "tokens_trained": 700,
        "seconds": 12.5,
        "seconds/train": 1.0,
    }
    assert _curve(tracking, job.run_id, "train_loss") == [(16, 3.0)]
    assert run.data.tags["checkpoint.path"] == str(checkpoint / MODEL_FILE)
    assert run.data.tags["checkpoint.digest"] == REPORT.checkpoint_digest
    assert [artifact.path for artifact in tracking.client().list_artifacts(job.run_id)] == [
        "checkpoint.json",
        "report.json",
    ]
    (listed,) = (checkpoint.parent / "artifacts").rglob("checkpoint.json")
    assert json.loads(listed.read_text())["checkpoint.path"] == str(checkpoint / MODEL_FILE)


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("trainer died"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_job_that_ends_early_says_how(
    tracking: Tracking, open_job: Callable[[], TrackedJob], error: BaseException, status: str
) -> None:
    def run() -> None:
        with open_job():
            raise error

    with pytest.raises(type(error)):
        run()
    assert _statuses(tracking) == dict.fromkeys(["fedavg", "fedavg site-1", "fedavg site-2"], status)


def test_all_jobs_share_one_experiment(tracking: Tracking, open_job: Callable[[], TrackedJob]) -> None:
    first, second = open_job(), open_job()
    client = tracking.client()
    assert client.get_run(first.run_id).info.experiment_id == client.get_run(second.run_id).info.experiment_id


def _register(tracking: Tracking, run_id: str, checkpoint: Path, job: str, test_loss: float, data: str) -> str:
    return register(tracking, "fedsft-tiny", run_id, replace(REPORT, job=job, test_loss=test_loss), checkpoint, data)


def test_champion_is_the_version_with_the_lowest_test_loss_on_the_same_data(
    tracking: Tracking, open_job: Callable[[], TrackedJob], checkpoint: Path
) -> None:
    run_id = open_job().run_id

    def champion() -> str:
        version = tracking.client().get_model_version_by_alias("fedsft-tiny", CHAMPION)
        return f"{version.tags['job']} on {version.tags['data']}"

    assert _register(tracking, run_id, checkpoint, "alpaca", 3.0, "old data") == "1"
    assert champion() == "alpaca on old data"
    assert _register(tracking, run_id, checkpoint, "fedavg", 1.0, "old data") == "2"
    assert champion() == "fedavg on old data"
    assert _register(tracking, run_id, checkpoint, "dolly", 10.0, "old data") == "3"
    assert champion() == "fedavg on old data"
    assert _register(tracking, run_id, checkpoint, "dolly", 9.5, "new data") == "4"
    assert champion() == "dolly on new data"
    assert _register(tracking, run_id, checkpoint, "oasst1", 10.0, "new data") == "5"
    assert champion() == "dolly on new data"


def test_registered_version_leads_to_its_checkpoint_and_mlflow_run(
    tracking: Tracking, open_job: Callable[[], TrackedJob], checkpoint: Path
) -> None:
    run_id = open_job().run_id
    number = _register(tracking, run_id, checkpoint, "fedavg", 2.25, "data")
    version = tracking.client().get_model_version("fedsft-tiny", number)
    assert (version.run_id, version.source) == (run_id, (checkpoint / MODEL_FILE).as_uri())
    assert (version.tags["test_loss"], version.tags["digest"]) == ("2.25", REPORT.checkpoint_digest)
