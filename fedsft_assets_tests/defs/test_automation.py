"""What re-runs the study by itself: nothing until it is switched on, and then only what new data touches."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from mlflow import MlflowClient

from fedsft_assets.definitions import defs
from fedsft_assets.defs.assets.raw import raw_asset
from fedsft_assets.defs.automation import undelivered_tracking
from fedsft_assets.defs.resources import MLflowResource, SourceResource, StoreResource, resources
from fedsft_assets.federation.protocol.points import Point
from fedsft_assets.settings import Settings
from fedsft_assets.tracking import Outbox
from fedsft_assets.tracking.record import Ending, TrackedExecution
from fedsft_assets_tests.shipped import DATASETS

SENSOR = defs.resolve_sensor_def("new_data")
SCHEDULE = defs.resolve_schedule_def("weekly_study")
JOBS = ("alpaca", "combined", "dolly", "fedavg", "oasst1")
TOUCHED_BY_ANY_DATASET = {
    "combined",
    "comparison",
    "inference",
    *(f"job_folder/{job}" for job in JOBS),
    *(f"checkpoint/{job}" for job in JOBS),
    *(f"evaluation/{model}" for model in ("base_model", *JOBS)),
}
EVERYTHING = {
    "base_model",
    *TOUCHED_BY_ANY_DATASET,
    *(f"{column}/{dataset}" for column in ("raw", "processed") for dataset in DATASETS),
}


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def context(source: Path, instance: dg.DagsterInstance) -> Iterator[dg.SensorEvaluationContext]:
    with dg.build_sensor_context(
        instance=instance,
        repository_def=defs.get_repository_def(),
        resources={"source": SourceResource(data=str(source))},
    ) as context:
        yield context


def _change(source: Path, dataset: str) -> None:
    """Give a dataset other rows, as its publisher would."""
    file = source / DATASETS[dataset].folder / DATASETS[dataset].file_names[0]
    if file.suffix == ".jsonl":
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        file.write_text("".join(lines[:-1]), encoding="utf-8")
    else:
        import pyarrow.parquet as pq

        table = pq.read_table(file)
        pq.write_table(table.slice(0, len(table) - 1), file)


def _materialize_everything(instance: dg.DagsterInstance, source: Path, home: Path) -> None:
    """Raw data for real, since the sensor compares with its data version; all else is reported."""
    raw = [raw_asset(dataset) for dataset in DATASETS.values()]
    given = resources(Settings(home=home, data=str(source)))
    assert dg.materialize(raw, instance=instance, resources=given).success
    for key in EVERYTHING - {f"raw/{name}" for name in DATASETS}:
        instance.report_runless_asset_event(dg.AssetMaterialization(key.split("/")))


def _tick(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
    result = SENSOR(context)
    assert isinstance(result, dg.SensorResult | dg.SkipReason)
    if isinstance(result, dg.SensorResult):
        assert result.cursor is not None
        context.update_cursor(result.cursor)
    return result


def _asked_for(result: dg.SensorResult | dg.SkipReason) -> set[str]:
    assert isinstance(result, dg.SensorResult)
    assert result.run_requests is not None
    (request,) = result.run_requests
    assert request.asset_selection is not None
    return {key.to_user_string() for key in request.asset_selection}


def test_schedule_and_sensor_are_off_until_switched_on() -> None:
    assert SCHEDULE.default_status == dg.DefaultScheduleStatus.STOPPED
    assert SENSOR.default_status == dg.DefaultSensorStatus.STOPPED


def test_schedule_runs_the_full_study_once_a_week() -> None:
    assert SCHEDULE.cron_schedule == "0 3 * * 0"
    job = defs.resolve_job_def(SCHEDULE.job_name)
    assert {key.to_user_string() for key in job.asset_layer.executable_asset_keys} == EVERYTHING


def test_first_tick_asks_for_everything_with_what_it_needs(context: dg.SensorEvaluationContext) -> None:
    assert _asked_for(_tick(context)) == EVERYTHING


def test_nothing_is_asked_for_twice(context: dg.SensorEvaluationContext) -> None:
    _tick(context)
    assert isinstance(_tick(context), dg.SkipReason)


def test_materialized_data_that_has_not_changed_is_left_alone(
    context: dg.SensorEvaluationContext, instance: dg.DagsterInstance, source: Path, tmp_path: Path
) -> None:
    _materialize_everything(instance, source, tmp_path)
    (source / DATASETS["dolly"].folder / DATASETS["dolly"].file_names[0]).touch()
    (source / DATASETS["dolly"].folder / "README.md").write_text("not data")
    assert isinstance(_tick(context), dg.SkipReason)


@pytest.mark.parametrize("dataset", list(DATASETS))
def test_changed_dataset_rebuilds_what_is_downstream_of_it_and_only_that(
    dataset: str, context: dg.SensorEvaluationContext, instance: dg.DagsterInstance, source: Path, tmp_path: Path
) -> None:
    _materialize_everything(instance, source, tmp_path)
    _change(source, dataset)
    result = _tick(context)
    others = {f"checkpoint/{other}" for other in DATASETS if other != dataset}  # local training on other data
    assert _asked_for(result) == (TOUCHED_BY_ANY_DATASET - others) | {f"raw/{dataset}", f"processed/{dataset}"}
    assert result.run_requests[0].tags["fedsft/changed"] == dataset  # type: ignore[union-attr,index]
    assert isinstance(_tick(context), dg.SkipReason)


def test_two_changed_datasets_are_one_request(
    context: dg.SensorEvaluationContext, instance: dg.DagsterInstance, source: Path, tmp_path: Path
) -> None:
    _materialize_everything(instance, source, tmp_path)
    _change(source, "alpaca")
    _change(source, "oasst1")
    assert _asked_for(_tick(context)) == EVERYTHING - {"base_model", "raw/dolly", "processed/dolly", "checkpoint/dolly"}


def test_data_that_changes_back_is_new_again(
    context: dg.SensorEvaluationContext, instance: dg.DagsterInstance, source: Path, tmp_path: Path
) -> None:
    file = source / DATASETS["dolly"].folder / DATASETS["dolly"].file_names[0]
    before = file.read_bytes()
    _change(source, "dolly")
    _materialize_everything(instance, source, tmp_path)
    file.write_bytes(before)
    assert "raw/dolly" in _asked_for(_tick(context))


def test_missing_source_is_an_error_that_names_it(context: dg.SensorEvaluationContext, source: Path) -> None:
    missing = source / DATASETS["dolly"].folder / DATASETS["dolly"].file_names[0]
    missing.unlink()
    with pytest.raises(Exception, match=missing.name):
        _tick(context)


def test_requested_assets_can_be_run(context: dg.SensorEvaluationContext) -> None:
    """Dagster refuses a run request for assets that the sensor's target does not cover."""
    data = SENSOR.evaluate_tick(context)
    (request,) = data.run_requests or []
    assert request.asset_selection is not None
    assert {key.to_user_string() for key in request.asset_selection} == EVERYTHING


def _deliver(instance: dg.DagsterInstance, home: Path, uri: str) -> str:
    resources = {"store": StoreResource(home=str(home)), "mlflow": MLflowResource(uri=uri)}
    with dg.build_sensor_context(instance=instance, resources=resources) as context:
        skipped = undelivered_tracking(context)
    assert isinstance(skipped, dg.SkipReason)
    return skipped.skip_message or ""


def test_nobody_is_asked_when_nothing_waits_for_the_tracking_server(
    tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    assert _deliver(instance, tmp_path, "no tracking server at all") == "no pending MLflow records"


def test_what_waits_for_the_tracking_server_is_delivered_without_a_person(
    tmp_path: Path, empty_mlflow_database: Path, instance: dg.DagsterInstance
) -> None:
    store = Settings(home=tmp_path).store
    shutil.copyfile(empty_mlflow_database, tmp_path / "mlflow.db")
    execution = TrackedExecution("its id", "fedavg", ["site-1"], {"rounds": "3"}, {}, "a note", 1.7e9)
    Outbox(store.outbox).put(execution, [Point("val_loss", 2.0, 0, 0, time=1.7e9)], Ending("KILLED", 1.7e9 + 5))

    no_database = f"sqlite:///{tmp_path}"
    assert _deliver(instance, tmp_path, no_database).startswith("fedavg: not delivered: ")
    assert Outbox(store.outbox).entries() == ["its id"]
    assert _deliver(instance, tmp_path, store.mlflow_uri) == "all delivered"
    assert _deliver(instance, tmp_path, store.mlflow_uri) == "no pending MLflow records"

    client = MlflowClient(store.mlflow_uri)
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert {run.info.run_name: run.info.status for run in runs} == {"fedavg": "KILLED", "fedavg site-1": "KILLED"}


def test_delivery_runs_from_the_start() -> None:
    assert undelivered_tracking.default_status == dg.DefaultSensorStatus.RUNNING
