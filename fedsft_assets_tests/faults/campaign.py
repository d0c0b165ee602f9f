"""Executions of jobs in which processes are killed, until each has come to its end, and what came of them."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from fedsft_assets.execution import journal_points
from fedsft_assets.federation.processes import marked_processes
from fedsft_assets.federation.record import Workspace
from fedsft_assets.federation.report import JobReport
from fedsft_assets.store import Store
from fedsft_assets.tracking import Tracking
from fedsft_assets_tests.faults.worker import LOST
from fedsft_assets_tests.prepared import build_job

# Whom a kill may hit, by what stands in its command line; the worker is the process that executes the job.
VICTIMS = {
    "worker": "",
    "supervisor": "fedsft_assets.federation.supervisor",
    "server": "fedsft_assets.federation.simulator",
    "trainer": "fedsft_assets.federation.client",
}
_JOBS = {"alpaca": {}, "fedavg": {"rounds": 4}, "dolly": {"wire": "bf16-diff"}}
_SHORT = {"rounds": 6, "max_local_steps": 2, "max_evaluation_records": 8, "optimizer_state": "reset"}
_LONGEST_ATTEMPT = 600.0
_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Fault:
    """Kill the victim `seconds` after an attempt began, or once it has written so many more lines in its journal."""

    victim: str
    seconds: float | None
    lines: int | None


@dataclass
class Outcome:
    """`injected` counts kills that hit, `wrong` says what differs from executions without any."""

    injected: int = 0
    recovered: int = 0
    victims: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def random_faults(seed: int) -> Iterator[Fault]:
    """An endless list: half of the kills come while an attempt starts, half while it trains."""
    chance = random.Random(seed)
    while True:
        victim = chance.choice(list(VICTIMS))
        if chance.random() < 0.5:
            yield Fault(victim, chance.uniform(0.0, 12.0), None)
        else:
            yield Fault(victim, None, chance.randint(1, 80))


def run_campaign(store: Store, seed: int, kills: int, say: Callable[[str], object] = print) -> Outcome:
    """Inject so many kills into executions of several jobs, at most ten into each."""
    faults, outcome = random_faults(seed), Outcome()
    while outcome.injected < kills:
        for job, overrides in _JOBS.items():
            build_job(store, job, **{**_SHORT, **overrides})
            if not (store.home / "reference" / job).exists():
                _execute(store, job)
                shutil.copytree(store.flare(job), store.home / "reference" / job)
                shutil.copytree(store.checkpoint(job), store.home / "reference" / f"{job}.checkpoint")
            before = outcome.injected
            _execute_with_faults(store, job, faults, min(10, kills - outcome.injected), outcome, say)
            if differs := _differences(store, job):
                outcome.wrong.append(f"{job} after kills {before + 1} to {outcome.injected}: {'; '.join(differs)}")
            else:
                outcome.recovered += outcome.injected - before
            say(f"{job}: {outcome.injected} of {kills} injected, {outcome.recovered} recovered")
            if outcome.injected >= kills:
                break
    return outcome


def _execute(store: Store, job: str) -> None:
    with _attempt(store, job) as worker:
        code = worker.wait(timeout=_LONGEST_ATTEMPT)
    if code != 0:
        raise RuntimeError(f"{job} failed without any kill:\n{_log(store, job).read_text(encoding='utf-8')}")


def _execute_with_faults(
    store: Store, job: str, faults: Iterator[Fault], kills: int, outcome: Outcome, say: Callable[[str], object]
) -> None:
    """Attempts until one ends well; each but the last has something killed in it."""
    injected = 0
    while True:
        fault = next(faults) if injected < kills else None
        with _attempt(store, job) as worker:
            if fault and _inject(store, job, worker, fault):
                injected += 1
                outcome.injected += 1
                outcome.victims[fault.victim] += 1
                say(f"  {job}: killed the {fault.victim} ({fault})")
            code = worker.wait(timeout=_LONGEST_ATTEMPT)
        _wait_until_gone(str(store.flare(job)))
        if code == 0:
            return
        if code not in (LOST, -signal.SIGKILL):
            said = _log(store, job).read_text(encoding="utf-8")
            raise RuntimeError(f"{job}: the attempt after {fault} ended with exit code {code}:\n{said}")


@contextlib.contextmanager
def _attempt(store: Store, job: str) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", "fedsft_assets_tests.faults.worker", str(store.home), job]
    log = _log(store, job)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        worker = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=Path(__file__).parents[2])
    try:
        yield worker
    finally:
        if worker.poll() is None:
            worker.kill()
            worker.wait()


def _inject(store: Store, job: str, worker: "subprocess.Popen[bytes]", fault: Fault) -> bool:
    """Wait for the fault's moment and kill; False if the attempt ended before, or the victim was not there."""
    journal = Workspace(store.flare(job)).journal
    begun, first = time.monotonic(), _lines(journal)
    while worker.poll() is None:
        late = fault.seconds is not None and time.monotonic() - begun >= fault.seconds
        if late or (fault.lines is not None and _lines(journal) - first >= fault.lines):
            return _kill(store, job, worker, fault.victim)
        time.sleep(0.05)
    return False


def _kill(store: Store, job: str, worker: "subprocess.Popen[bytes]", victim: str) -> bool:
    if victim == "worker":
        worker.kill()
        return True
    for process in marked_processes(str(store.flare(job))):
        with contextlib.suppress(psutil.Error):
            if VICTIMS[victim] in process.cmdline():
                process.kill()
                return True
    return False


def _differences(store: Store, job: str) -> list[str]:
    """How an execution differs from the one without kills: weights, curves, and what MLflow has of them."""
    reference = store.home / "reference" / job
    one, other = (
        torch.load(folder / "result" / "last_global_model.pt", weights_only=True)
        for folder in (reference, store.flare(job))
    )
    differs = []
    far = max((one[name] - other[name]).abs().max().item() for name in one)
    if far > _TOLERANCE:
        differs.append(f"weights differ by up to {far:.3g}")
    expected = JobReport.read(store.home / "reference" / f"{job}.checkpoint")
    found = JobReport.read(store.checkpoint(job))
    for name in ("samples", "tokens", "best_round", "missed"):
        if getattr(expected, name) != getattr(found, name):
            differs.append(f"{name}: {getattr(found, name)} instead of {getattr(expected, name)}")
    points = [point for point in journal_points(Workspace(store.flare(job)).journal) if "seconds/" not in point.name]
    expected_points = [p for p in journal_points(Workspace(reference).journal) if "seconds/" not in p.name]
    if doubled := [identity for identity, count in Counter(p.identity for p in points).items() if count > 1]:
        differs.append(f"points are there twice: {doubled[:3]}")
    if {p.identity for p in points} != {p.identity for p in expected_points}:
        differs.append("other points than without kills")
    return differs + _differences_in_mlflow(store, job)


def _differences_in_mlflow(store: Store, job: str) -> list[str]:
    """What is missing from the job's last MLflow run, or there more than once."""
    client = Tracking(store.mlflow_uri, store.mlflow_artifacts).client()
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()], f"attributes.run_name = '{job}'")
    last = max(runs, key=lambda run: run.info.start_time)
    differs = [] if last.info.status == "FINISHED" else [f"the MLflow run is {last.info.status}"]
    wanted = [p for p in journal_points(Workspace(store.flare(job)).journal) if p.site is None]
    for name in {p.name for p in wanted}:
        history = Counter(m.step for m in client.get_metric_history(last.info.run_id, name))
        if history != Counter(p.samples for p in wanted if p.name == name):
            differs.append(f"MLflow has other points of {name}")
    return differs


def _wait_until_gone(mark: str) -> None:
    """What a killed worker leaves ends by itself."""
    deadline = time.monotonic() + 60
    while (left := marked_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.2)
    if left:
        raise RuntimeError(f"processes {[process.pid for process in left]} were left behind")


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def _log(store: Store, job: str) -> Path:
    return store.home / "logs" / f"{job}-{os.getpid()}.log"
