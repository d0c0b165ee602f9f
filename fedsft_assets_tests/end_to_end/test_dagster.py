"""The study through Dagster itself: the command, a cancelled run, and the sensor in the real daemon."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest

from fedsft_assets.federation.runtimes.processes import MARK, marked_processes, stop_marked
from fedsft_assets.process_env import home_environment
from fedsft_assets.settings import PROJECT, Settings
from fedsft_assets.store import Store
from fedsft_assets.tracking import Tracking
from fedsft_assets_tests.shipped import DATASETS

pytestmark = pytest.mark.slow

QUICK_JOB = "description: a quick job\nsites:\n  site-1: {dataset: alpaca}\nrounds: 1\nmax_local_steps: 2\n"
LONG_JOB = "description: a long job\nsites:\n  site-1: {dataset: combined}\nrounds: 50\n"


@pytest.fixture
def start(tmp_path: Path, source: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a command over a home of the test's own, with one job; all that it starts ends with the test."""
    settings = Settings(home=tmp_path / "home", jobs=tmp_path / "jobs", data=str(source))
    settings.jobs.mkdir()
    mark = f"test {tmp_path}"

    def start_command(*command: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            **home_environment(settings.home),
            "FEDSFT_JOBS": str(settings.jobs),
            "FEDSFT_DATA": settings.data,
            MARK: mark,
        }
        return subprocess.Popen(
            [sys.executable, "-m", *command], env=environment, text=True, stdout=subprocess.PIPE, cwd=PROJECT
        )

    yield start_command
    stop_marked(mark)


@contextlib.contextmanager
def _instance(home: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.from_config(str(home / "dagster")) as instance:
        yield instance


def _materializations(home: Path) -> dict[str, int]:
    """How often each asset was materialized."""
    with _instance(home) as instance:
        return {
            key.to_user_string(): len(instance.fetch_materializations(key, limit=100).records)
            for key in instance.all_asset_keys()
        }


def test_cancelled_study_stops_its_job_and_leaves_nothing_behind(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    (tmp_path / "jobs" / "long.yaml").write_text(LONG_JOB)
    store = Store(tmp_path / "home")
    study = start("fedsft_assets.cli", "study")
    assert study.stdout is not None
    assert any("long · site-1 · round 1 of 50 · step" in line for line in study.stdout)
    assert marked_processes(str(store.flare("long")))

    study.send_signal(signal.SIGINT)
    study.communicate()

    assert study.returncode != 0
    assert marked_processes(str(store.flare("long"))) == []
    client = Tracking(store.mlflow_uri).client()
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert {run.info.status for run in runs} == {"KILLED"}
    with _instance(store.home) as instance:
        (run,) = instance.get_runs()
        assert run.is_finished
        assert not run.is_success
        assert not instance.event_log_storage.get_concurrency_info("gpu").active_slot_count


def test_sensor_in_the_daemon_rebuilds_only_what_new_data_touches(
    tmp_path: Path, source: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    (tmp_path / "jobs" / "quick.yaml").write_text(QUICK_JOB)
    home = tmp_path / "home"
    out, _ = start("fedsft_assets.cli", "study").communicate()
    assert "base model" in out
    assert set(_materializations(home).values()) == {1}

    dolly = source / DATASETS["dolly"].folder / DATASETS["dolly"].file_names[0]
    row = {"instruction": "Is a wolf an animal?", "context": "", "response": "It is.", "category": "open_qa"}
    dolly.write_text(dolly.read_text() + json.dumps(row) + "\n")
    workspace = ("--workspace", str(PROJECT / "workspace.yaml"))
    assert start("dagster", "sensor", "start", "new_data", *workspace).wait() == 0
    daemon = start("dagster._daemon", "run", *workspace)
    finished: list[dg.DagsterRun] = []
    with _instance(home) as instance:
        deadline = time.monotonic() + 400
        while not finished and time.monotonic() < deadline and daemon.poll() is None:
            time.sleep(1)
            runs = instance.get_runs(filters=dg.RunsFilter(tags={"fedsft/changed": "dolly"}))
            finished = [run for run in runs if run.is_finished]
    assert [run.status for run in finished] == [dg.DagsterRunStatus.SUCCESS]
    again = {name for name, times in _materializations(home).items() if times == 2}
    assert again == {
        "raw/dolly",
        "processed/dolly",
        "combined",
        "job_folder/quick",
        "evaluation/quick",  # of the same checkpoint: the job trains on other data
        "evaluation/base_model",
        "comparison",
    }


@pytest.mark.long
def test_study_after_a_killed_one_does_not_wait_for_its_pool_slot(
    tmp_path: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    (tmp_path / "jobs" / "quick.yaml").write_text(LONG_JOB)
    killed = start("fedsft_assets.cli", "study")
    assert killed.stdout is not None
    assert any("quick · site-1 · round 1 of 50 · step" in line for line in killed.stdout)
    killed.kill()
    killed.wait()  # its step goes on, until the next execution of the job ends it
    (tmp_path / "jobs" / "quick.yaml").write_text(QUICK_JOB)

    again = start("fedsft_assets.cli", "study")
    out, _ = again.communicate()

    assert again.returncode == 0, out
    with _instance(tmp_path / "home") as instance:
        statuses = [run.status for run in instance.get_runs()]
    assert statuses == [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.CANCELED]
    assert len(marked_processes(str(Store(tmp_path / "home").flare("quick")))) == 0
