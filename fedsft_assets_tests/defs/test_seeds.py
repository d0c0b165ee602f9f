"""A study over several seeds: a partition for each, and one comparison of all."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest

from fedsft_assets.defs.assets.base_model import base_model_asset
from fedsft_assets.defs.assets.checkpoint import checkpoint_asset
from fedsft_assets.defs.assets.comparison import comparison_asset
from fedsft_assets.defs.assets.evaluation import base_model_evaluation_asset, evaluation_asset
from fedsft_assets.defs.assets.job_folder import job_folder_asset
from fedsft_assets.defs.resources import resources
from fedsft_assets.defs.seeds import of_study, seed_partitions
from fedsft_assets.defs.study_jobs import COMPARE, FOLLOWED, PREPARE_DATA, TRAIN, study_jobs, study_sensors
from fedsft_assets.execution import CheckpointInputs
from fedsft_assets.federation.job_folder import JobFolder
from fedsft_assets.federation.protocol.job_report import MODEL_FILE, JobReport
from fedsft_assets.model.archive.nemo_archive import content_digest
from fedsft_assets.model.base_model import create_base_model
from fedsft_assets.settings import PROJECT, Settings
from fedsft_assets.specs.job import JobSpec
from fedsft_assets.store import Store, archive_file
from fedsft_assets.versions import Verdict, current, judge
from fedsft_assets_tests.federation.protocol.test_job_report import REPORT
from fedsft_assets_tests.prepared import TINY, build_job, made_current, prepare_home
from fedsft_assets_tests.shipped import DATASETS

JOBS = ("alpaca", "fedavg")
SEEDS = seed_partitions([1234, 1235])
FOLDERS = [dg.AssetKey(["job_folder", job]) for job in JOBS]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A home whose jobs were trained with both seeds: each checkpoint has the weights of its seed's base model."""
    store = prepare_home(tmp_path_factory.mktemp("home"))
    judge(current(store.combined), Verdict())
    for dataset in DATASETS:
        judge(current(store.processed(dataset)), Verdict())
    for seed in (1234, 1235):
        own = Store(store.home, None if seed == 1234 else seed)
        with made_current(own.base_model(TINY.name)) as base_model:
            create_base_model(TINY, into=base_model / f"{TINY.name}.nemo", seed=seed)
        base = archive_file(current(own.base_model(TINY.name)))
        for job in JOBS:
            build_job(own, job, seed=seed)
            folder = JobFolder.read(current(own.job_folder(job)))
            digest = content_digest(base)
            with made_current(own.checkpoint(job)) as checkpoint:
                (checkpoint / MODEL_FILE).write_bytes(base.read_bytes())
                (checkpoint / "val_loss.png").write_bytes(b"\x89PNG")
                digests = {"checkpoint_digest": digest, "base_model_digest": digest}
                made = replace(REPORT, job=job, kind=folder.spec.kind, runtime="simulator", seed=seed, **digests)
                made.write(checkpoint)
                CheckpointInputs.of(folder).write(checkpoint)
    return store


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def _assets() -> list[dg.AssetsDefinition | dg.AssetSpec]:
    jobs = [JobSpec.load(PROJECT / "jobs" / f"{job}.yaml", list(DATASETS)) for job in JOBS]
    data = [dg.AssetKey("combined"), *(dg.AssetKey(["processed", name]) for name in DATASETS)]
    return [
        *(dg.AssetSpec(key).with_io_manager_key("io_manager") for key in data),
        base_model_asset(SEEDS),
        *(job_folder_asset(job, SEEDS) for job in jobs),
        *(checkpoint_asset(job, SEEDS) for job in jobs),
        base_model_evaluation_asset(SEEDS),
        *(evaluation_asset(job, SEEDS) for job in jobs),
        comparison_asset(jobs, list(DATASETS.values())),
    ]


def _materialize(
    store: Store, instance: dg.DagsterInstance, selection: dg.AssetSelection, seed: str | None = None, **config: object
) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        _assets(),
        selection=selection,
        resources=resources(Settings(home=store.home)),
        instance=instance,
        partition_key=seed,
        run_config={"ops": config},
        raise_on_error=False,
    )


def test_each_seed_has_its_own_base_model_job_folder_and_checkpoint(store: Store, instance: dg.DagsterInstance) -> None:
    everything = dg.AssetSelection.all() - dg.AssetSelection.assets("comparison")
    made = {}
    for seed in ("1234", "1235"):
        result = _materialize(store, instance, everything, seed)
        assert result.success
        made[seed] = {
            event.asset_key.to_user_string(): event.materialization.metadata["path"].value
            for event in result.get_asset_materialization_events()
            if event.asset_key
        }
    assert made["1234"].keys() == made["1235"].keys()
    assert not set(made["1234"].values()) & set(made["1235"].values())
    assert JobFolder.read(Path(str(made["1235"]["job_folder/fedavg"]))).plans[0].seed == 1235

    compared = _materialize(store, instance, dg.AssetSelection.assets("comparison"))
    assert compared.success
    table = (current(store.report("comparison")) / "comparison.md").read_text()
    assert "Every job was trained with the seeds 1234, 1235" in table


def test_folder_of_the_default_seed_is_that_of_a_study_over_one(store: Store, instance: dg.DagsterInstance) -> None:
    before = current(store.job_folder("alpaca"))
    _materialize(store, instance, dg.AssetSelection.assets(FOLDERS[0]), "1234")
    assert current(store.job_folder("alpaca")) == before
    assert JobReport.read(current(store.checkpoint("alpaca"))).seed == 1234


def test_launchpad_cannot_ask_a_partition_for_another_seed(store: Store, instance: dg.DagsterInstance) -> None:
    config = {"job_folder__alpaca": {"config": {"seed": 99}}}
    result = _materialize(store, instance, dg.AssetSelection.assets(FOLDERS[0]), "1235", **config)
    assert not result.success
    failure = result.failure_data_for_node("job_folder__alpaca")
    assert failure
    assert failure.user_failure_data
    assert failure.user_failure_data.description == (
        "seed: 99, but this is the partition of seed 1235; leave the field out"
    )


def test_comparison_takes_the_versions_of_its_study_even_if_newer_ones_are_current(
    store: Store, instance: dg.DagsterInstance
) -> None:
    evaluations = dg.AssetSelection.groups("evaluations")
    runs = [_materialize(store, instance, evaluations, seed).run_id for seed in ("1234", "1235")]
    made = {seed: current(Store(store.home, seed).evaluation("alpaca")) for seed in (None, 1235)}
    for seed in (None, 1235):  # another study on fewer records
        with made_current(Store(store.home, seed).evaluation("alpaca")) as newer:
            (newer / "losses.parquet").write_bytes(b"other")
    compared = dg.materialize(
        _assets(),
        selection=dg.AssetSelection.assets("comparison"),
        resources=resources(Settings(home=store.home)),
        instance=instance,
        tags=of_study(runs),
    )
    assert compared.success
    assert made[None] != made[1235]


def _finished(instance: dg.DagsterInstance, job: str, tags: dict[str, str]) -> dg.DagsterRun:
    run = dg.DagsterRun(job_name=job, tags=tags, status=dg.DagsterRunStatus.SUCCESS)
    return instance.add_run(run)


def _requests(instance: dg.DagsterInstance, run: dg.DagsterRun) -> list[dg.RunRequest]:
    (sensor,) = study_sensors(SEEDS, study_jobs(SEEDS, SEEDS))
    context = dg.build_run_status_sensor_context(
        sensor_name=sensor.name,
        dagster_instance=instance,
        dagster_run=run,
        dagster_event=dg.DagsterEvent(dg.DagsterEventType.RUN_SUCCESS.value, run.job_name),
    )
    return [found for found in sensor(context) if isinstance(found, dg.RunRequest)]


def test_scheduled_study_goes_from_data_to_each_seed_to_the_comparison(instance: dg.DagsterInstance) -> None:
    data = _finished(instance, PREPARE_DATA, {FOLLOWED: "weekly_study"})
    seeds = _requests(instance, data)
    assert [(request.job_name, request.partition_key) for request in seeds] == [(TRAIN, "1234"), (TRAIN, "1235")]
    first, second = [{**request.tags, "dagster/partition": request.partition_key or ""} for request in seeds]
    run = _finished(instance, TRAIN, first)
    assert _requests(instance, run) == []  # the other seed is missing
    last = _finished(instance, TRAIN, second)
    (comparison,) = _requests(instance, last)
    assert comparison.job_name == COMPARE
    assert comparison.tags == of_study([data.run_id, run.run_id, last.run_id])


def test_nothing_follows_a_run_that_was_launched_by_hand(instance: dg.DagsterInstance) -> None:
    assert _requests(instance, _finished(instance, PREPARE_DATA, {})) == []
    assert _requests(instance, _finished(instance, TRAIN, {"dagster/partition": "1234"})) == []


def test_one_seed_has_one_job_and_no_sensor() -> None:
    assert seed_partitions([]) is None
    assert [job.name for job in study_jobs(None, None)] == ["full_study"]
    assert study_sensors(None, study_jobs(None, None)) == []
