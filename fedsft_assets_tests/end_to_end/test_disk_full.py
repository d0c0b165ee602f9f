"""Disks that are full in the middle of a job, for real, and what becomes of the job when there is room again."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsft_assets.federation.protocol.events import Event, JobError
from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.federation.protocol.journal import Progress
from fedsft_assets.federation.runtimes.processes import marked_processes
from fedsft_assets.federation.supervisor.launch import begin_execution, read_job_folder, run_job
from fedsft_assets.federation.supervisor.workspace import Workspace
from fedsft_assets.settings import PROJECT
from fedsft_assets.store import Store, split_file
from fedsft_assets.versions import current
from fedsft_assets_tests.faults.attempts import workspace_of
from fedsft_assets_tests.faults.comparison import differences_in_mlflow
from fedsft_assets_tests.faults.worker import LOST, REFUSED
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
    execution = begin_execution(read_job_folder(current(store.job_folder(job))), workspace.folder, "simulator")

    def run(watch: Callable[[Event], object]) -> JobReport:
        for event in run_job(
            current(store.job_folder(job)),
            workspace.folder,
            split_file(current(store.combined), "testing"),
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
    went_on = [event.text for event in events if isinstance(event, Progress) and "resuming after round" in event.text]
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
        shutil.copytree(prepared_home, disk, symlinks=True, dirs_exist_ok=True)
        store, ballast = Store(disk), disk / "ballast"
        job = build_job(store, "alpaca", **SHORT)

        def fill_after_two_rounds(line: str) -> None:
            if f"after 2 of {ROUNDS} rounds" in line:
                fill(ballast)

        code, said = _attempt(store, job, fill_after_two_rounds)
        assert code in (REFUSED, LOST)
        assert any("No space left on device" in line for line in said if "TensorBoard" not in line), "".join(said)
        assert marked_processes(str(store.flare(job))) == []
        ballast.unlink()
        code, said = _attempt(store, job)
        assert code == 0, said
        assert any("resuming after round" in line for line in said)
        assert len(JobReport.read(current(store.checkpoint(job))).val_loss) == ROUNDS + 1
        workspace = workspace_of(current(store.job_folder(job)), store, "simulator")
        assert differences_in_mlflow(store, workspace, ["site-1"]) == []


def _study(home: Path, watch: Callable[[str], object] = lambda _: None) -> tuple[int, list[str]]:
    """`fedsft study`: its exit code, and all that a person sees of it."""
    command = [sys.executable, "-m", "fedsft_assets.cli", "study"]
    environment = {**os.environ, "FEDSFT_HOME": str(home)}
    seen = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=PROJECT, env=environment
    ) as study:
        assert study.stdout is not None
        for line in study.stdout:
            seen.append(line)
            watch(line)
    return study.returncode, seen


@pytest.mark.long
def test_person_reads_one_line_of_a_full_disk_and_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jobs").mkdir()
    job = "description: one\nsites:\n  site-1: {dataset: alpaca}\nrounds: 3\nmax_local_steps: 2\n"
    (tmp_path / "jobs" / "one.yaml").write_text(f"{job}max_evaluation_records: 8\n")
    monkeypatch.setenv("FEDSFT_JOBS", str(tmp_path / "jobs"))
    with small_disk(tmp_path / "home", megabytes=200) as home:
        ballast, after = home / "ballast", []

        def fill_at(moment: str) -> Callable[[str], None]:
            after.clear()

            def watch(line: str) -> None:
                if ballast.exists():
                    after.append(line)
                elif moment in line:
                    fill(ballast)

            return watch

        for moment in ("✓  raw/alpaca", "after 1 of 3 rounds"):
            code, seen = _study(home, fill_at(moment))
            assert code == 1, seen
            assert [line for line in after if not line[:5].strip().isdigit()] == after[-1:], after
            # What the job ended with is gone, and has made some room.
            said = rf"{re.escape(str(home))}: no space left on its disk \([\d.]+ MB free in .*\); free some space"
            assert re.match(said, after[-1]), after
            assert marked_processes(str(Store(home).flare("one"))) == []
            ballast.unlink()
        code, seen = _study(home)
        assert code == 0, seen


@pytest.mark.parametrize("command", ["study", "ui", "tensorboard", "poc start"])
def test_person_reads_one_line_of_a_home_that_cannot_be_written(tmp_path: Path, command: str) -> None:
    with small_disk(tmp_path / "disk", megabytes=20) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for home in (disk, disk / "new"):
            done = subprocess.run(
                [sys.executable, "-m", "fedsft_assets.cli", *command.split()],
                env={**os.environ, "FEDSFT_HOME": str(home)},
                capture_output=True,
                text=True,
                cwd=PROJECT,
                check=False,
            )
            assert done.returncode == 1
            (said,) = done.stderr.splitlines()
            assert said.startswith(str(home))
            assert f"user 0 cannot write there: Read-only file system (21.0 MB free in {home})" in said
            assert "Traceback" not in done.stdout
