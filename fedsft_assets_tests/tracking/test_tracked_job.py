"""Tracking, with a real MLflow over a SQLite store: what a job's MLflow runs hold."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedsft_assets.federation.protocol.job_report import MODEL_FILE
from fedsft_assets.federation.protocol.journal import to_line
from fedsft_assets.federation.protocol.points import Point
from fedsft_assets.store import Store
from fedsft_assets.tracking import Outbox, Tracking
from fedsft_assets.tracking.datasets import UsedSplit
from fedsft_assets_tests.tracking.examples import (
    REPORT,
    RESULTS,
    SITES,
    curve,
    expected,
    finish,
    job_points,
    journal_file,
    runs,
    statuses,
    stored,
    track,
    until,
    write,
)
from fedsft_assets_tests.tracking.server import HOST, unused_port


def _cancel(tracking: Tracking, store: Store, points: list[Point], error: BaseException, **others: object) -> None:
    def run() -> None:
        with track(tracking, store, **others):
            write(store, points)
            raise error

    with pytest.raises(type(error)):
        run()


def test_job_has_one_mlflow_run_with_a_child_for_each_site(tracking: Tracking, store: Store) -> None:
    job = track(tracking, store)
    until(lambda: len(runs(tracking)) == 3 and runs(tracking)["fedavg"].data.params, "three MLflow runs")
    found = runs(tracking)
    assert sorted(found) == ["fedavg", "fedavg site-1", "fedavg site-2"]
    parent = found["fedavg"].data
    assert parent.params == {"rounds": "2", "learning_rate": "0.004", "max_local_steps": "None"}
    assert (parent.tags["dagster.run_id"], parent.tags["mlflow.note.content"]) == ("abc", "FedAvg over two")
    assert job.run_id == found["fedavg"].info.run_id
    for site in SITES:
        tags = found[f"fedavg {site}"].data.tags
        assert (tags["mlflow.parentRunId"], tags["site"], tags["dagster.run_id"]) == (job.run_id, site, "abc")
    assert set(statuses(tracking).values()) == {"RUNNING"}


def test_curves_share_the_axis_of_records_trained_on(tracking: Tracking, store: Store, checkpoint: Path) -> None:
    with track(tracking, store) as job:
        write(store, job_points())
        finish(job, checkpoint)
    assert curve(tracking, "fedavg", "val_loss") == list(zip(REPORT.samples, REPORT.val_loss, strict=True))
    assert curve(tracking, "fedavg", "train_loss") == [(32, 4.9), (64, 4.8), (96, 3.9), (128, 3.8)]
    for site in SITES:
        assert curve(tracking, f"fedavg {site}", "val_loss") == [(0, 7.0), (32, 2.0), (64, 2.5)]
        assert curve(tracking, f"fedavg {site}", "system/sent_bytes") == [(64, 110.0)]
        assert curve(tracking, f"fedavg {site}", "train_loss") == [(16, 4.9), (32, 4.8), (48, 3.9), (64, 3.8)]
        assert curve(tracking, "fedavg", f"val_loss.{site}") == [(0, 7.0), (32, 2.0), (64, 2.5)]
        assert curve(tracking, "fedavg", f"train_loss.{site}") == []
    metrics = runs(tracking)["fedavg"].data.metrics
    assert metrics["system/server_cpu_seconds"] == 0.5
    assert not any(name.startswith("system/") and name.endswith(tuple(SITES)) for name in metrics)
    assert stored(tracking) == expected(job_points())


def test_points_are_in_mlflow_while_the_job_runs(tracking: Tracking, store: Store) -> None:
    track(tracking, store)
    write(store, [Point("train_loss", 3.0, 1, 16, "site-1", 1, 100), Point("val_loss", 2.0, 1, 32)])
    until(lambda: curve(tracking, "fedavg", "val_loss") == [(32, 2.0)], "val_loss is there")
    until(lambda: curve(tracking, "fedavg site-1", "train_loss") == [(16, 3.0)], "train_loss is there")
    assert statuses(tracking)["fedavg"] == "RUNNING"


def test_more_points_than_one_call_takes_arrive_once(tracking: Tracking, store: Store, checkpoint: Path) -> None:
    points = [Point("train_loss", float(step), 1, step, None, step, 1, time=1.7e9 + step) for step in range(1, 1202)]
    with track(tracking, store) as job:
        write(store, points)
        finish(job, checkpoint)
    assert stored(tracking) == expected(points)


def test_numbers_that_are_none_arrive_too(tracking: Tracking, store: Store, checkpoint: Path) -> None:
    odd = [float("nan"), float("inf"), float("-inf"), -0.0, 5e-324, 1 / 3]
    points = [Point("train_loss", value, 1, i, None, i, 1, time=1.7e9) for i, value in enumerate(odd)]
    with track(tracking, store) as job:
        write(store, points)
        finish(job, checkpoint)
    largest = 1.7976931348623157e308
    assert [value for *_, value in stored(tracking)] == list(
        map(repr, [float("nan"), largest, -largest, 0.0, 5e-324, 1 / 3])
    )
    assert Outbox(store.outbox).entries() == []


def test_of_a_round_that_is_done_twice_the_first_points_count(
    tracking: Tracking, store: Store, checkpoint: Path
) -> None:
    points = job_points()
    again = [replace(point, value=point.value + 1, time=point.time + 100) for point in points if point.round == 1]
    journal_file(store).parent.mkdir(parents=True)
    with track(tracking, store) as job:
        with journal_file(store).open("a", encoding="utf-8") as file:  # as no Journal would write it
            file.writelines(to_line(point) for point in [*points, *again])
        finish(job, checkpoint)
    assert stored(tracking) == expected(points)


def test_points_that_were_in_the_journal_before_arrive_too(tracking: Tracking, store: Store, checkpoint: Path) -> None:
    write(store, job_points())
    with track(tracking, store) as job:
        finish(job, checkpoint)
    assert stored(tracking) == expected(job_points())


def test_points_of_a_journal_that_is_gone_arrive_all_the_same(tracking: Tracking, store: Store) -> None:
    """The supervisor removes it when another history begins, and this one fails."""
    write(store, job_points())

    def run() -> None:
        with track(tracking, store):
            until(lambda: curve(tracking, "fedavg", "val_loss"), "points are there")
            journal_file(store).unlink()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        run()
    assert stored(tracking) == expected(job_points())


def test_finished_job_has_its_results_artifacts_and_status(tracking: Tracking, store: Store, checkpoint: Path) -> None:
    with track(tracking, store) as job:
        registered = finish(job, checkpoint)
    assert (registered.model, registered.version, registered.run_id) == ("fedsft-tiny", "1", job.run_id)
    assert set(statuses(tracking).values()) == {"FINISHED"}
    run = tracking.client().get_run(job.run_id)
    assert run.data.metrics == RESULTS
    assert run.data.tags["checkpoint.path"] == str(checkpoint / MODEL_FILE)
    assert run.data.tags["checkpoint.digest"] == REPORT.checkpoint_digest
    assert [artifact.path for artifact in tracking.client().list_artifacts(job.run_id)] == [
        "checkpoint.json",
        "report.json",
    ]
    (listed,) = store.mlflow_artifacts.rglob("checkpoint.json")
    assert json.loads(listed.read_text())["checkpoint.path"] == str(checkpoint / MODEL_FILE)
    assert Outbox(store.outbox).entries() == []
    assert list(store.outbox.iterdir()) == []


def test_datasets_are_inputs_of_the_mlflow_run_and_results_belong_to_the_model_and_its_split(
    tracking: Tracking, store: Store, checkpoint: Path
) -> None:
    digest = "d" * 64
    splits = [
        UsedSplit("dolly", "training", "e" * 64, "/processed/dolly/training.jsonl"),
        UsedSplit("combined", "testing", digest, "/combined/testing.jsonl"),
    ]
    for attempt in ("first", "second"):  # the second finds all of it there
        with track(tracking, store, "the execution", splits=splits) as job:
            job.finish(REPORT, checkpoint, [], model="fedsft-tiny", data=digest)
            assert job.run_id, attempt
    client = tracking.client()
    used = client.get_run(job.run_id).inputs.dataset_inputs
    assert sorted((one.dataset.name, one.dataset.digest, one.tags[0].value) for one in used) == [
        ("combined/testing", digest[:36], "testing"),
        ("dolly/training", "e" * 36, "training"),
    ]
    (best,) = client.search_logged_models(
        [tracking.experiment_id()],
        filter_string="metrics.test_loss < 3",
        datasets=[{"dataset_name": "combined/testing", "dataset_digest": digest[:36]}],
        order_by=[{"field_name": "metrics.test_loss", "ascending": True}],
    )
    found = {metric.key: (metric.value, metric.dataset_name) for metric in best.metrics}
    assert {name: value for name, (value, _) in found.items()} == RESULTS
    assert found["test_loss"] == (2.25, "combined/testing")
    assert found["best_val_loss"] == (2.0, "combined/validation")
    assert found["seconds"] == (12.5, None)
    assert len(best.metrics) == len(RESULTS)


def test_execution_is_as_long_in_mlflow_as_it_was(tracking: Tracking, store: Store, checkpoint: Path) -> None:
    with track(tracking, store) as job:
        finish(job, checkpoint)
    info = tracking.client().get_run(job.run_id).info
    results = tracking.client().get_metric_history(job.run_id, "test_loss")
    assert info.start_time <= info.end_time == results[0].timestamp


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("trainer died"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_job_that_ends_early_says_how_and_keeps_its_points(
    tracking: Tracking, store: Store, error: BaseException, status: str
) -> None:
    points = job_points()[:7]
    _cancel(tracking, store, points, error)
    assert statuses(tracking) == dict.fromkeys(["fedavg", "fedavg site-1", "fedavg site-2"], status)
    assert stored(tracking) == expected(points)
    assert Outbox(store.outbox).entries() == []


def test_attempt_that_goes_on_continues_the_mlflow_runs(tracking: Tracking, store: Store, checkpoint: Path) -> None:
    points = job_points()
    _cancel(tracking, store, points[:9], RuntimeError("trainer died"), execution_id="first")
    before = {name: run.info.run_id for name, run in runs(tracking).items()}
    with track(tracking, store, "first", tags={"dagster.run_id": "second"}) as job:
        until(lambda: set(statuses(tracking).values()) == {"RUNNING"}, "the MLflow runs live again")
        write(store, points[9:])
        finish(job, checkpoint)
    assert {name: run.info.run_id for name, run in runs(tracking).items()} == before
    assert {run.data.tags["dagster.run_id"] for run in runs(tracking).values()} == {"second"}
    assert set(statuses(tracking).values()) == {"FINISHED"}
    assert stored(tracking) == expected(points)


def test_execution_whose_process_died_is_closed_when_another_begins(
    tracking: Tracking, store: Store, checkpoint: Path
) -> None:
    points = job_points()
    dead = track(tracking, store, "first")
    write(store, points[:5])
    until(lambda: stored(tracking) == expected(points[:5]), "its points are there")
    dead._delivery._given_up.set()  # what is left of a process that was killed
    dead._delivery.join()
    journal_file(store).unlink()
    runs_before = runs(tracking)
    for run in runs_before.values():
        tracking.client().update_run(run.info.run_id, name=f"first {run.info.run_name}")
    with track(tracking, store, "second") as job:
        finish(job, checkpoint)
    Outbox(store.outbox).deliver(tracking)
    found = statuses(tracking)
    assert {name: status for name, status in found.items() if name.startswith("first")} == {
        "first fedavg": "KILLED",
        "first fedavg site-1": "KILLED",
        "first fedavg site-2": "KILLED",
    }
    assert {status for name, status in found.items() if not name.startswith("first")} == {"FINISHED"}
    assert [(f"first {name}", *rest) for name, *rest in expected(points[:5])] == stored(tracking)


@pytest.mark.parametrize("delivered", [True, False])
def test_process_that_dies_at_the_very_end_goes_on_in_the_same_mlflow_runs(
    tracking: Tracking, store: Store, checkpoint: Path, delivered: bool
) -> None:
    """All is in MLflow, or in the outbox, but whoever runs the job does not know that it has ended."""
    points = job_points()
    first = tracking if delivered else Tracking(f"http://{HOST}:{unused_port()}", patience=0.1)
    write(store, points)
    for server in (first, tracking):
        with track(server, store, "first") as job:
            registered = finish(job, checkpoint)
    assert (registered.version, registered.run_id) == ("1", runs(tracking)["fedavg"].info.run_id)
    assert set(statuses(tracking).values()) == {"FINISHED"}
    assert stored(tracking) == expected(points)
    assert {name: curve(tracking, "fedavg", name) for name in RESULTS} == {k: [(0, v)] for k, v in RESULTS.items()}
    assert len(tracking.client().search_model_versions("name = 'fedsft-tiny'")) == 1
    assert list(store.outbox.iterdir()) == []


def test_all_jobs_share_one_experiment(tracking: Tracking) -> None:
    assert tracking.experiment_id() == tracking.experiment_id()


def test_registered_version_leads_to_its_checkpoint_and_mlflow_run(
    tracking: Tracking, store: Store, checkpoint: Path
) -> None:
    with track(tracking, store) as job:
        registered = finish(job, checkpoint)
    version = tracking.client().get_model_version("fedsft-tiny", registered.version)
    assert version.run_id == job.run_id
    assert (version.tags["job"], version.tags["archive"]) == ("fedavg", str(checkpoint / MODEL_FILE))
    assert (version.tags["test_loss"], version.tags["digest"]) == ("2.25", REPORT.checkpoint_digest)
