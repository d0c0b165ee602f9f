"""The study from a terminal: what overrides become, and what a person is told."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from fedsft_assets.cli import main as cli
from fedsft_assets.cli import study
from fedsft_assets.cli.study import full_study, prepare_instance, study_run_config
from fedsft_assets.defs.assets.job_folder import JobOverrides
from fedsft_assets.defs.run import StudyFailedError, log_line
from fedsft_assets.federation.runtimes.choose import poc_system
from fedsft_assets.federation.runtimes.processes import MARK
from fedsft_assets.home_file import HomeError
from fedsft_assets.process_env import home_environment
from fedsft_assets.settings import PROJECT, Settings
from fedsft_assets.specs.job import JobSpec, load_jobs
from fedsft_assets.specs.runtime import RuntimeSettings
from fedsft_assets_tests.shipped import DATASETS

NOTHING = dict.fromkeys(JobOverrides.model_fields)


@pytest.fixture(scope="module")
def jobs() -> list[JobSpec]:
    return load_jobs(PROJECT / "jobs", list(DATASETS))


def test_overrides_reach_every_job_folder(jobs: list[JobSpec]) -> None:
    config = study_run_config({**NOTHING, "rounds": 3, "learning_rate": 0.01}, jobs, sites=3)
    assert config == {
        "ops": {f"job_folder__{job.name}": {"config": {"rounds": 3, "learning_rate": 0.01}} for job in jobs}
    }


def test_centralized_job_gets_the_steps_of_all_sites_together(jobs: list[JobSpec]) -> None:
    ops = study_run_config({**NOTHING, "max_local_steps": 12, "rounds": 3}, jobs, sites=3)["ops"]
    steps = {name.removeprefix("job_folder__"): op["config"]["max_local_steps"] for name, op in ops.items()}
    assert steps == {"alpaca": 12, "combined": 36, "dolly": 12, "fedavg": 12, "oasst1": 12}
    assert {op["config"]["rounds"] for op in ops.values()} == {3}


def test_no_override_is_no_config(jobs: list[JobSpec]) -> None:
    assert study_run_config(NOTHING, jobs, sites=3) == {"ops": {}}


def test_every_override_of_the_command_is_one_that_dagster_takes(
    jobs: list[JobSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides: dict[str, object] = {}

    def note(given: dict[str, object], _: Settings) -> None:
        overrides.update(given)
        raise StudyFailedError("it is not run")

    for name in home_environment(tmp_path):
        monkeypatch.setenv(name, "as it was")  # so that it is put back afterwards
    monkeypatch.setenv("FEDSFT_HOME", str(tmp_path))
    monkeypatch.setattr(study, "prepare_instance", lambda _: None)
    monkeypatch.setattr(study, "run_study", note)
    options = [word for name in NOTHING for word in (f"--{name.replace('_', '-')}", "2")]
    monkeypatch.setattr("sys.argv", ["fedsft", "study", *options])
    with pytest.raises(SystemExit, match="it is not run"):
        cli.main()
    assert overrides.keys() == JobOverrides.model_fields.keys()
    assert dg.validate_run_config(full_study(), study_run_config(overrides, jobs, sites=3))


def test_unknown_override_is_refused_by_dagster(jobs: list[JobSpec]) -> None:
    with pytest.raises(dg.DagsterInvalidConfigError):
        dg.validate_run_config(full_study(), study_run_config({"epochs": 2}, jobs, sites=3))


def test_instance_is_made_under_home_with_the_settings_of_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(home=tmp_path / "home")
    for name in home_environment(settings.home):
        monkeypatch.setenv(name, "as it was")  # so that it is put back afterwards
    prepare_instance(settings)
    with dg.DagsterInstance.get() as instance:
        assert Path(instance.root_directory) == tmp_path / "home" / "dagster"
        assert instance.event_log_storage.get_pool_config().default_pool_limit == 1
        assert not instance.telemetry_enabled


def test_installation_that_mlflow_cannot_work_in_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda _: "/50% off/.venv/lib/python3.11/site-packages")
    with pytest.raises(HomeError, match=r"^/50% off/.*: MLflow cannot create a database"):
        prepare_instance(Settings(home=tmp_path / "home"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("copied", [False, True])
def test_poc_that_runs_where_the_home_was_moved_from_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: bool
) -> None:
    old, new = tmp_path / "home", tmp_path / "moved"
    for name in home_environment(old):
        monkeypatch.setenv(name, "as it was")  # so that it is put back afterwards
    prepare_instance(Settings(home=old))
    mark = poc_system(old, RuntimeSettings()).mark
    with subprocess.Popen(["sleep", "600"], env={**os.environ, MARK: mark}) as service:
        try:
            (shutil.copytree if copied else shutil.move)(old, new)  # type: ignore[operator]
            prepare_instance(Settings(home=new))
            assert (service.poll() is None) == copied
        finally:
            service.kill()


@dg.asset(key_prefix="checkpoint", name="good")
def _good(context: dg.AssetExecutionContext) -> None:
    context.log.info("good · site-1 · round 1 of 1")
    context.log.debug("of no interest")


@dg.asset(key_prefix="job_folder", name="refused")
def _refused() -> None:
    raise dg.Failure("job refused: the trainer of site-1 failed:\nTraceback of the trainer")


@dg.asset(key_prefix="raw", name="broken")
def _broken() -> None:
    raise ValueError("alpaca: a row is bad")


def test_a_person_is_told_what_starts_what_is_made_and_what_failed() -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([_good, _refused, _broken], instance=instance, raise_on_error=False)
        records = instance.get_records_for_run(result.run_id).records
    lines = [line for record in records if (line := log_line(record.event_log_entry, Settings()))]
    assert lines.index("▸  checkpoint/good") < lines.index("   good · site-1 · round 1 of 1")
    assert lines.index("   good · site-1 · round 1 of 1") < lines.index("✓  checkpoint/good")
    (refused,) = (line for line in lines if "refused failed" in line)
    assert refused == (
        "✗  job_folder__refused failed: job refused: the trainer of site-1 failed:\nTraceback of the trainer"
    )
    (broken,) = (line for line in lines if "broken failed" in line)
    assert "ValueError: alpaca: a row is bad" in broken
    assert len(lines) == 5


@dg.multi_asset_check(
    specs=[dg.AssetCheckSpec(name, asset=_good.key) for name in ("fine", "odd", "wrong")],
)
def _checks() -> Iterator[dg.AssetCheckResult]:
    yield dg.AssetCheckResult(check_name="fine", passed=True, description="nothing to say.")
    warn = dg.AssetCheckSeverity.WARN
    yield dg.AssetCheckResult(check_name="odd", passed=False, severity=warn, description="7 rows repeat another.")
    yield dg.AssetCheckResult(check_name="wrong", passed=False, description="3 records have a blank output.")


def test_a_person_is_told_of_checks_that_did_not_pass() -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([_good, _checks], instance=instance, raise_on_error=False)
        records = instance.get_records_for_run(result.run_id).records
    lines = [line for record in records if (line := log_line(record.event_log_entry, Settings()))]
    assert [line for line in lines if "good: " in line] == [
        "!  checkpoint/good: 7 rows repeat another.",
        "✗  checkpoint/good: 3 records have a blank output.",
    ]
