"""Disks that are full in the middle of a job, for real, and what becomes of the job when there is room again."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsft_assets.federation.events import Event, JobError
from fedsft_assets.federation.journal import Progress
from fedsft_assets.federation.launch import begin_execution, run_job
from fedsft_assets.federation.processes import marked_processes
from fedsft_assets.federation.record import Workspace
from fedsft_assets.federation.report import JobReport
from fedsft_assets.settings import PROJECT
from fedsft_assets.store import Store, split_file
from fedsft_assets_tests.faults.comparison import differences_in_mlflow
from fedsft_assets_tests.faults.worker import LOST
from fedsft_assets_tests.prepared import build_job
from fedsft_assets_tests.small_disk import fill, small_disk, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=str(why_not())),
]

ROUNDS = 6
SHORT = {"rounds": ROUNDS, "max_local_steps": 2, "max_evaluation_records": 8}


def test_server_whose_disk_is_full_says_so_and_goes_on_when_there_is_room(
    store: Store, build: Callable[..., str], tmp_path: Path
) -> None:
    job = build("alpaca", **SHORT)
    workspace = Workspace(store.flare(job))
    execution = begin_execution(store.job_folder(job), workspace.folder, "simulator")

    def run(watch: Callable[[Event], object]) -> JobReport:
        for event in run_job(
            store.job_folder(job),
            workspace.folder,
            split_file(store.combined, "testing"),
            store.checkpoint(job),
            execution=execution,
        ):
            watch(event)
        assert isinstance(event, JobReport)
        return event

    states, kept = workspace.runtime / "states", tmp_path / "kept"
    with small_disk(states, megabytes=40) as disk:
        ballast = disk / "ballast"

        def fill_after_two_rounds(event: Event) -> None:
            if isinstance(event, Progress) and f"after 2 of {ROUNDS} rounds" in event.text:
                fill(ballast)

        with pytest.raises(JobError, match=r"No space left on device"):
            run(fill_after_two_rounds)
        assert marked_processes(str(workspace.folder)) == []
        ballast.unlink()
        shutil.copytree(disk, kept)
    shutil.copytree(kept, states, dirs_exist_ok=True)
    events: list[Event] = []
    report = run(events.append)
    went_on = [event.text for event in events if isinstance(event, Progress) and "goes on after round" in event.text]
    assert len(went_on) == 1
    assert len(report.val_loss) == ROUNDS + 1


def _attempt(store: Store, job: str, watch: Callable[[str], object] = lambda _: None) -> tuple[int, list[str]]:
    """An attempt in a process of its own, as Dagster makes one: its exit code and what it said."""
    command = [sys.executable, "-m", "fedsft_assets_tests.faults.worker", str(store.home), job, "simulator"]
    said = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=PROJECT) as worker:
        assert worker.stdout is not None
        for line in worker.stdout:
            said.append(line)
            watch(line)
    return worker.returncode, said


def test_study_whose_disk_is_full_says_so_and_goes_on_when_there_is_room(prepared_home: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "home", megabytes=120) as disk:
        shutil.copytree(prepared_home, disk, dirs_exist_ok=True)
        store, ballast = Store(disk), disk / "ballast"
        job = build_job(store, "alpaca", **SHORT)

        def fill_after_two_rounds(line: str) -> None:
            if f"after 2 of {ROUNDS} rounds" in line:
                fill(ballast)

        code, said = _attempt(store, job, fill_after_two_rounds)
        assert code in (1, LOST)
        assert any("No space left on device" in line for line in said)
        assert marked_processes(str(store.flare(job))) == []
        ballast.unlink()
        code, said = _attempt(store, job)
        assert code == 0, said
        assert any(line.startswith("goes on after round") for line in said)
        assert len(JobReport.read(store.checkpoint(job)).val_loss) == ROUNDS + 1
        assert differences_in_mlflow(store, job, ["site-1"]) == []
