"""What a user sees when something dies or is stopped, and that nothing of the job stays behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import psutil
import pytest

from fedsft_assets.execution import execute_job
from fedsft_assets.federation.job_folder import JobFolder
from fedsft_assets.federation.protocol.events import Event, JobError
from fedsft_assets.federation.protocol.journal import Progress
from fedsft_assets.federation.runtimes.processes import marked_processes
from fedsft_assets.federation.supervisor.launch import run_job
from fedsft_assets.store import Store, split_file
from fedsft_assets.tracking import Tracking
from fedsft_assets.versions import current
from fedsft_assets_tests.prepared import TINY

pytestmark = pytest.mark.slow

_RUN = """
import sys
from pathlib import Path
from fedsft_assets.federation.protocol.journal import Progress
from fedsft_assets.federation.supervisor.launch import run_job
for event in run_job(*map(Path, sys.argv[1:])):
    print(event, flush=True)
"""


def _events(job: str, store: Store) -> Iterator[Event]:
    return run_job(
        current(store.job_folder(job)),
        store.flare(job),
        split_file(current(store.combined), "testing"),
        store.checkpoint(job),
    )


def _trainers(job: str, store: Store) -> list[psutil.Process]:
    found = []
    for process in marked_processes(str(store.flare(job))):
        with contextlib.suppress(psutil.Error):  # it ended since it was listed
            if "fedsft_assets.federation.site.process" in process.cmdline():
                found.append(process)
    return found


def _is_training(event: Event) -> bool:
    return isinstance(event, Progress) and "step" in event.text


def _kill_a_trainer_in_a_round(job: str, store: Store) -> None:
    for event in _events(job, store):
        if _is_training(event):
            for trainer in _trainers(job, store)[:1]:
                trainer.send_signal(signal.SIGKILL)


def _wait_until_gone(mark: str) -> list[psutil.Process]:
    deadline = time.monotonic() + 60
    while (left := marked_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return left


def test_killed_trainer_fails_the_job_with_a_clear_message(store: Store, build: Callable[..., str]) -> None:
    job = build("fedavg", rounds=50)
    store.checkpoint(job).mkdir(parents=True)
    earlier = store.checkpoint(job) / "model.nemo"
    earlier.write_text("what an earlier execution left")
    with pytest.raises(JobError, match=r"the trainer of site-\d failed:\n.*killed by signal 9 \(SIGKILL\)"):
        _kill_a_trainer_in_a_round(job, store)
    assert marked_processes(str(store.flare(job))) == []
    assert earlier.read_text() == "what an earlier execution left"


def test_crashed_trainer_shows_its_own_traceback(store: Store, build: Callable[..., str]) -> None:
    job = build("alpaca")
    plan = JobFolder.read(current(store.job_folder(job))).located_plans[0]
    plan.training_file.write_text(plan.training_file.read_text() + "\n")
    tracking = Tracking(store.mlflow_uri, store.mlflow_artifacts)
    with pytest.raises(JobError) as failure:
        execute_job(current(store.job_folder(job)), store, TINY, tracking, {})
    assert "the trainer of site-1 failed" in str(failure.value)
    assert "Traceback (most recent call last)" in str(failure.value)
    assert f"{plan.training_file} has changed; build the job folder again" in str(failure.value)
    assert marked_processes(str(store.flare(job))) == []
    client = tracking.client()
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert {run.info.status for run in runs} == {"FAILED"}


def test_loss_that_is_no_number_ends_the_job_and_says_where(store: Store, build: Callable[..., str]) -> None:
    job = build("fedavg", learning_rate=1e30, rounds=50, max_local_steps=5, max_evaluation_records=8)
    with pytest.raises(JobError, match=r"site-\d: the loss is (nan|inf) in round 1, step 2 of 5, at") as failure:
        list(_events(job, store))
    assert not failure.value.retryable
    assert marked_processes(str(store.flare(job))) == []


def test_closing_the_events_stops_the_job(store: Store, build: Callable[..., str]) -> None:
    job = build("fedavg", rounds=50)
    events = _events(job, store)
    assert any(_is_training(event) for event in events)
    assert len(_trainers(job, store)) == 3
    events.close()  # type: ignore[attr-defined]
    assert marked_processes(str(store.flare(job))) == []


def test_killed_launcher_leaves_no_process(store: Store, build: Callable[..., str]) -> None:
    job = build("alpaca", rounds=50)
    mark = str(store.flare(job))
    arguments = [
        current(store.job_folder(job)),
        mark,
        split_file(current(store.combined), "testing"),
        store.checkpoint(job),
    ]
    with subprocess.Popen([sys.executable, "-c", _RUN, *map(str, arguments)], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        try:
            assert any("step" in line for line in run.stdout)
            assert _trainers(job, store)
        finally:
            run.kill()
    assert _wait_until_gone(mark) == []


def test_next_attempt_ends_what_a_killed_launcher_and_supervisor_left(store: Store, build: Callable[..., str]) -> None:
    job = build("alpaca", rounds=2)
    mark = str(store.flare(job))
    orphan = subprocess.Popen(
        [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(600)"],
        env={**os.environ, "FEDSFT_JOB_MARK": mark},
        start_new_session=True,
        stdout=subprocess.PIPE,
    )
    assert orphan.stdout
    orphan.stdout.readline()  # nobody sees the mark of a process that is still being made
    try:
        *_, report = _events(job, store)
        assert orphan.wait(timeout=1) == -signal.SIGTERM
    finally:
        with contextlib.suppress(ProcessLookupError):
            orphan.kill()
    assert len(report.val_loss) == 3  # type: ignore[union-attr]
    assert json.loads((store.checkpoint(job) / "report.json").read_text())["rounds"] == 2
