"""A federated job in a real POC: trained and fetched, aborted in the middle; and the commands for the POC itself."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.federation.protocol.journal import JOURNAL_FILE, Progress
from fedsft_assets.federation.protocol.messages import BEST_MODEL, LAST_MODEL
from fedsft_assets.federation.protocol.tail import Tail
from fedsft_assets.federation.runtimes.poc.runtime import Poc
from fedsft_assets.federation.runtimes.poc.system import PocSystem
from fedsft_assets.federation.runtimes.processes import MARK, marked_processes
from fedsft_assets.federation.supervisor.launch import begin_execution, read_job_folder, run_job
from fedsft_assets.federation.supervisor.workspace import Workspace
from fedsft_assets.process_env import home_environment
from fedsft_assets.specs.runtime import PocSettings, RuntimeSettings
from fedsft_assets.store import Store, split_file
from fedsft_assets.versions import current
from fedsft_assets_tests.prepared import build_job
from fedsft_assets_tests.sockets import scanned

pytestmark = pytest.mark.slow

SITES = ["site-1", "site-2", "site-3"]
# Of the server, a site, their parts of a job, and a trainer.
PROGRAMS = {
    "nvflare.private.fed.app.server.server_train",
    "nvflare.private.fed.app.client.client_train",
    "nvflare.private.fed.app.server.runner_process",
    "nvflare.private.fed.app.client.worker_process",
    "fedsft_assets.federation.site.process",
}


@pytest.fixture(scope="module")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("empty_home")


@pytest.fixture(scope="module")
def system(prepared_home: Path, tmp_path_factory: pytest.TempPathFactory, empty_home: Path) -> Iterator[PocSystem]:
    home = tmp_path_factory.mktemp("poc_home")
    shutil.copytree(prepared_home, home, symlinks=True, dirs_exist_ok=True)
    environment = {**home_environment(home), "HOME": str(empty_home)}
    system = PocSystem(home / "poc", PocSettings(), environment)
    try:
        yield system
    finally:
        system.stop()


def _trainers(system: PocSystem, job_id: str) -> list[psutil.Process]:
    """The trainers of a job, without what is forked from one and has not become another program yet."""
    found = []
    for process in system.job_processes(job_id):
        with suppress(psutil.Error):
            parent = process.parent()
            if _is_trainer(process) and not (parent and _is_trainer(parent)):
                found.append(process)
    return found


def _is_trainer(process: psutil.Process) -> bool:
    return "fedsft_assets.federation.site.process" in process.cmdline()


def test_federated_job_trains_in_a_poc_and_its_files_come_back(
    system: PocSystem, store: Store, build: Callable[..., str], tmp_path: Path, empty_home: Path
) -> None:
    job = build("fedavg", rounds=2, max_local_steps=2, max_evaluation_records=8)
    lines: list[str] = []
    seen_trainers: dict[int, dict[str, str]] = {}
    with Poc(system, tmp_path / "flare") as poc, scanned(system.mark) as scan:
        poc.prepare(SITES)
        job_id = poc.submit(current(store.job_folder(job)))
        while not (state := poc.poll(job_id)).ended:
            lines += poc.new_lines(job_id)
            for trainer in _trainers(system, job_id):
                with suppress(psutil.Error):
                    seen_trainers[trainer.pid] = trainer.environ()
            time.sleep(0.5)
        live = len(lines)
        lines += poc.new_lines(job_id)
        assert state.succeeded, f"{state.status}\n{poc.end_of_log(job_id, 'server', 40)}"
        poc.fetch(job_id, tmp_path / "files")
        assert "round 2" in poc.end_of_log(job_id, "site-2", 200)
    assert scan.beyond_loopback == []
    assert scan.programs >= PROGRAMS
    assert live > 0
    assert lines == (tmp_path / "files" / JOURNAL_FILE).read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    losses = {e["round"]: e["value"] for e in entries if e.get("name") == "val_loss" and not e.get("site")}
    assert set(losses) >= {0, 1, 2}
    assert losses[2] < losses[0]
    for name in (LAST_MODEL, BEST_MODEL):
        assert torch.load(tmp_path / "files" / name, map_location="cpu", weights_only=True)
    share = str(max(1, (os.cpu_count() or 1) // len(SITES)))
    assert len(seen_trainers) == len(SITES)
    assert {environment["OMP_NUM_THREADS"] for environment in seen_trainers.values()} == {share}
    assert list(empty_home.rglob("*")) == []
    assert system.status().state == "running"
    assert system.status().jobs == []


def test_job_that_is_aborted_while_it_trains_leaves_no_process(
    system: PocSystem, store: Store, build: Callable[..., str], tmp_path: Path
) -> None:
    job = build("fedavg", rounds=500, max_local_steps=2, max_evaluation_records=8)
    with Poc(system, tmp_path / "flare") as poc:
        poc.prepare(SITES)
        job_id = poc.submit(current(store.job_folder(job)))
        lines: list[str] = []
        while not any("train_loss" in line for line in lines):
            assert not poc.poll(job_id).ended
            time.sleep(0.5)
            lines += poc.new_lines(job_id)
        assert len(_trainers(system, job_id)) == len(SITES)
        poc.abort(job_id)
        assert system.job_processes(job_id) == []
        assert poc.poll(job_id).status == "FINISHED:ABORTED"
        lines += poc.new_lines(job_id)
        poc.fetch(job_id, tmp_path / "files")
        assert lines == Tail(tmp_path / "files" / JOURNAL_FILE).new_lines()
    assert len(marked_processes(system.mark)) == 1 + len(SITES)


_POC = RuntimeSettings(name="poc")
_SUPERVISOR_KILLED_BEFORE_IT_WRITES_THE_ID = """
import os, signal
from fedsft_assets.federation.supervisor import supervisor
from fedsft_assets.federation.supervisor.workspace import Workspace
save = Workspace.save
def killed(workspace, execution):
    if execution.job_id:
        os.kill(os.getpid(), signal.SIGKILL)
    return save(workspace, execution)
Workspace.save = killed
supervisor.main()
"""


def test_job_whose_submitter_is_killed_before_it_knows_the_id_is_taken_over(system: PocSystem) -> None:
    store = Store(system.folder.parent)
    job = build_job(store, "alpaca", rounds=1, max_local_steps=2, max_evaluation_records=8)
    folder, workspace, checkpoint = current(store.job_folder(job)), Workspace(store.flare(job)), store.checkpoint(job)
    testing_file = split_file(current(store.combined), "testing")
    before = {path.name for path in (system.folder / "jobs").glob("*")}
    execution = begin_execution(read_job_folder(folder), workspace.folder, "poc")
    options = {"job-folder": folder, "workspace": workspace.folder, "testing-file": testing_file, "into": checkpoint}
    killed = subprocess.run(
        [
            *(sys.executable, "-c", _SUPERVISOR_KILLED_BEFORE_IT_WRITES_THE_ID, "--runtime", _POC.model_dump_json()),
            *(word for name, value in options.items() for word in (f"--{name}", str(value))),
        ],
        env={**os.environ, "FEDSFT_HOME": str(system.folder.parent), MARK: str(workspace.folder)},
        stdout=subprocess.DEVNULL,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    left = workspace.execution()
    assert left is not None
    assert (left.id, left.submissions, left.job_id) == (execution.id, 1, None)

    with scanned(system.mark, str(workspace.folder)) as scan:
        events = list(run_job(folder, workspace.folder, testing_file, checkpoint, _POC))
    assert scan.beyond_loopback == []
    assert "fedsft_assets.federation.supervisor.supervisor" in scan.programs
    report = events[-1]
    assert isinstance(report, JobReport)
    assert Progress(f"reattaching to FLARE job {report.job_id}") in events
    assert {path.name for path in (system.folder / "jobs").glob("*")} - before == {report.job_id}
    assert len(report.val_loss) == 2


def test_commands_prepare_start_and_stop_the_poc_of_a_home(tmp_path: Path, empty_home: Path) -> None:
    environment = {**os.environ, "FEDSFT_HOME": str(tmp_path), "HOME": str(empty_home)}

    def fedsft_poc(action: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "fedsft_assets.cli", "poc", action]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    folder = tmp_path / "poc"
    try:
        assert fedsft_poc("status") == (3, f"POC in {folder}: not prepared\n")
        code, said = fedsft_poc("prepare")
        assert (code, said.splitlines()[0]) == (0, f"POC in {folder}: stopped")
        code, said = fedsft_poc("start")
        assert (code, said.splitlines()[0]) == (0, f"POC in {folder}: running")
        assert [line.split()[0] for line in said.splitlines()[2:]] == ["server", *SITES]
        assert fedsft_poc("status") == (0, said)
    finally:
        code, said = fedsft_poc("stop")
    assert code == 0
    assert said.startswith("ended 4 processes")
    code, said = fedsft_poc("renew")
    assert (code, said.splitlines()[0]) == (0, f"POC in {folder}: stopped")
    assert marked_processes(f"poc {folder}") == []
    assert list(empty_home.rglob("*")) == []
