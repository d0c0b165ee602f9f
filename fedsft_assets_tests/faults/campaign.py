"""Executions of jobs in which processes are killed, until each has come to its end, and what came of them."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from fedsft_assets.federation.job_folder import read_spec
from fedsft_assets.federation.journal import JOURNAL_FILE, Finished, RoundDone, from_line
from fedsft_assets.federation.metrics import Point
from fedsft_assets.federation.poc_kits import PocSettings
from fedsft_assets.federation.poc_system import PocSystem
from fedsft_assets.federation.processes import marked_processes, stop_marked
from fedsft_assets.federation.record import Execution, Workspace
from fedsft_assets.federation.report import REPORT_FILE
from fedsft_assets.federation.tail import Tail
from fedsft_assets.settings import Settings
from fedsft_assets.store import Store
from fedsft_assets_tests.faults import comparison
from fedsft_assets_tests.faults.kills import PLACES, SUPERVISOR, WORKER, Kill, When, random_kills
from fedsft_assets_tests.faults.processes import find
from fedsft_assets_tests.faults.worker import LOST
from fedsft_assets_tests.prepared import build_job

# Jobs that take turns, by what is special about them: the shipped job, and what is changed of it.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "three sites": ("fedavg", {"rounds": 4}),
    "bf16 differences": ("fedavg", {"rounds": 4, "wire": "bf16-diff"}),
    "momentum at the server": (
        "fedavg",
        {"rounds": 4, "algorithm": {"name": "fedopt", "optimizer": "momentum", "learning_rate": 1.0, "beta1": 0.6}},
    ),
    "scaffold": ("fedavg", {"rounds": 4, "algorithm": "scaffold"}),
    "one site": ("alpaca", {"rounds": 6}),
}
_SHORT = {"max_local_steps": 2, "max_evaluation_records": 8, "optimizer_state": "reset"}
_KILLS_AN_EXECUTION = 10
_LONGEST_ATTEMPT = 600.0
_LOOK_SECONDS = 0.01


@dataclass
class Outcome:
    """`injected` counts kills that hit, `wrong` says what differs from executions without any."""

    injected: int = 0
    recovered: int = 0
    victims: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, other: "Outcome") -> None:
        self.injected += other.injected
        self.recovered += other.recovered
        self.victims += other.victims
        self.wrong += other.wrong


class Campaign:
    """Kills in the executions of one runtime, one execution after the other."""

    def __init__(self, store: Store, runtime: str, seed: int, say: Callable[[str], object] = print) -> None:
        self.outcome = Outcome()
        self._stopped = False
        self._store, self._runtime, self._say = store, runtime, say
        self._kills = random_kills(PLACES[runtime], seed)
        self._poc = PocSystem(store.home / "poc", PocSettings(), Settings(home=store.home).environment())

    def run(self, kills: int, variants: list[str]) -> Outcome:
        """Inject so many kills into executions of these variants in turn. Whatever happens, nothing is left running."""
        try:
            while self.outcome.injected < kills:
                for variant in variants:
                    if self.outcome.injected < kills:
                        self._execute(variant, min(_KILLS_AN_EXECUTION, kills - self.outcome.injected))
                        self._say(
                            f"{self._runtime}: {self.outcome.injected} of {kills} injected,"
                            f" {self.outcome.recovered} recovered"
                        )
        except BaseException:
            self._stop_jobs()
            raise
        finally:
            self._poc.stop()
        if left := [process.pid for mark in self._marks for process in marked_processes(mark)]:
            self._wrong(f"processes {left} are left")
        return self.outcome

    def _wrong(self, what: str) -> None:
        self.outcome.wrong.append(what)
        self._say(f"WRONG in the {self._runtime}: {what}")

    def _stop_jobs(self) -> None:
        for mark in self._marks:
            stop_marked(mark)

    def _execute(self, variant: str, kills: int) -> None:
        """One execution of the variant with kills, beside one without, which is made when it is not there yet."""
        job, changes = VARIANTS[variant]
        build_job(self._store, job, **{**_SHORT, **changes})
        reference = self._store.home / "reference" / variant
        if not reference.exists():
            with _attempt(self._store, job, self._runtime) as worker:  # elsewhere, trainers may have more threads
                code = self._ended(worker)
            if code != 0:
                raise RuntimeError(f"{variant} failed without any kill:\n{self._log(job)}")
            shutil.copytree(self._store.flare(job), reference / "workspace")
            shutil.copytree(self._store.checkpoint(job), reference / "checkpoint")
        expected = comparison.Finished.read(reference / "workspace", reference / "checkpoint")
        before = self.outcome.injected
        try:
            self._attempts(variant, kills)
        except (RuntimeError, TimeoutError) as error:
            if self.outcome.injected == before:  # not for a kill, and so it would be the same again
                raise
            self._wrong(f"{variant}: {error}")
            self._stop_jobs()
            return
        found = comparison.Finished.read(self._store.flare(job), self._store.checkpoint(job))
        sites = list(read_spec(self._store.job_folder(job)).sites)
        differs = comparison.differences(expected, found)
        differs += comparison.differences_in_mlflow(self._store, job, sites)
        if differs:
            self._wrong(f"{variant}, kills {before + 1} to {self.outcome.injected}: {'; '.join(differs)}")
        else:
            self.outcome.recovered += self.outcome.injected - before

    def _attempts(self, variant: str, kills: int) -> None:
        """Attempts until one ends well; in each but the last, something is killed."""
        job, _ = VARIANTS[variant]
        injected, number = 0, 0
        while True:
            number += 1
            planned = next(self._kills)[: kills - injected]
            dead: list[str] = []
            with _attempt(self._store, job, self._runtime) as worker:
                view = _View(self._store, job, self._states)
                for kill in planned:
                    if not self._inject(kill, worker, view, self._store.flare(job)):
                        break
                    dead.append(kill.victim)
                    self.outcome.injected += 1
                    self.outcome.victims[kill.victim] += 1
                    self._say(f"  {self._runtime}, {variant}, attempt {number}: killed {kill}")
                code = self._ended(worker)
            injected += len(dead)
            if not {WORKER, SUPERVISOR} <= set(dead):  # else the next attempt ends what they left
                _wait_until_gone(str(self._store.flare(job)))
            if code == 0:
                return
            if code != (-signal.SIGKILL if WORKER in dead else LOST) or not dead:
                raise RuntimeError(f"{variant}: an attempt after {planned} ended with {code}:\n{self._log(job)}")

    def stop(self) -> None:
        """Have `run` end soon, from another thread."""
        self._stopped = True

    def _ended(self, worker: "subprocess.Popen[bytes]") -> int:
        """Its exit code, when it has one."""
        deadline = time.monotonic() + _LONGEST_ATTEMPT
        while (code := worker.poll()) is None:
            if self._stopped:
                raise KeyboardInterrupt
            if time.monotonic() > deadline:
                raise TimeoutError(f"an attempt takes more than {_LONGEST_ATTEMPT:.0f} s")
            time.sleep(_LOOK_SECONDS)
        return code

    def _inject(self, kill: Kill, worker: "subprocess.Popen[bytes]", view: "_View", workspace: Path) -> bool:
        """Wait for the kill's moment and its victim; False if the attempt ended before."""
        begun = time.monotonic()
        due: float | None = None
        while worker.poll() is None or (kill.when == When.NEXT and time.monotonic() < begun + kill.amount + 0.2):
            if due is None and (after := view.due(kill)) is not None:
                due = time.monotonic() + after
            if self._stopped:
                raise KeyboardInterrupt
            if due is not None and time.monotonic() >= due and self._hit(kill, worker, workspace):
                return True
            time.sleep(_LOOK_SECONDS)
        return False

    def _hit(self, kill: Kill, worker: "subprocess.Popen[bytes]", workspace: Path) -> bool:
        if kill.victim == WORKER:
            alive = worker.poll() is None
            worker.kill()
            return alive
        found = find(self._runtime, [self._poc.mark, str(workspace)], kill.victim)
        for process in found[int(kill.pick * len(found)) :]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
                return True
        return False

    @property
    def _marks(self) -> list[str]:
        return [self._poc.mark, *{str(self._store.flare(job)) for job, _ in VARIANTS.values()}]

    @property
    def _states(self) -> Path | None:
        """Where the server of a POC keeps its state."""
        return self._poc.folder / "states" if self._runtime == "poc" else None

    def _log(self, job: str) -> str:
        return _log(self._store, job).read_text(encoding="utf-8", errors="replace")


class _View:
    """What can be seen of an attempt from outside: the files that it and its server write."""

    def __init__(self, store: Store, job: str, states: Path | None) -> None:
        self._begun = time.monotonic()
        self._workspace = Workspace(store.flare(job))
        self._states = states or self._workspace.runtime / "states"
        self._report = store.checkpoint(job) / REPORT_FILE
        self._reported = _changed(self._report)
        self._earlier = self._execution()  # which this attempt may go on with, or not
        self._earlier_lines = self._server_lines()

    def due(self, kill: Kill) -> float | None:
        """Seconds until the kill is due, or None while its moment has not come."""
        match kill.when:
            case When.NEXT:
                return kill.amount
            case When.START:
                return max(0.0, self._begun + kill.amount - time.monotonic())
            case When.LINES:
                return 0.0 if len(self._new_lines()) >= kill.amount else None
        return kill.amount if self._has_come(kill.when) else None

    def _has_come(self, when: When) -> bool:
        match when:
            case When.SUBMISSION:
                execution = self._execution()
                known = self._earlier.submissions if self._goes_on() and self._earlier else 0
                return execution is not None and execution.submissions > known
            case When.RESULT:
                return any((self._state() / "results").rglob("*"))
            case When.ROUND:
                return self._a_round_ends()
            case When.CHECKPOINT:
                execution = self._execution()
                fetched = execution is not None and bool(execution.status) and not execution.ended
                return fetched or any(isinstance(from_line(line), Finished) for line in self._new_lines()[-1:])
            case _:
                return _changed(self._report) != self._reported

    def _a_round_ends(self) -> bool:
        """All results of a round beyond the first are scored, and the model that they make is not on the disk."""
        for line in reversed(self._new_lines()):
            entry = from_line(line)
            if isinstance(entry, RoundDone):
                return False
            if isinstance(entry, Point) and entry.name == "val_loss" and entry.site is None:
                return True
        return False

    def _goes_on(self) -> bool:
        """Whether the execution is that of the attempt before."""
        execution = self._execution()
        return execution is not None and self._earlier is not None and execution.id == self._earlier.id

    def _new_lines(self) -> list[str]:
        """What this attempt's server has written down."""
        return self._server_lines()[len(self._earlier_lines) if self._goes_on() else 0 :]

    def _execution(self) -> Execution | None:
        return self._workspace.execution()

    def _state(self) -> Path:
        execution = self._execution()
        return self._states / (execution.id if execution else "none")

    def _server_lines(self) -> list[str]:
        """Whole lines of the server's journal."""
        return Tail(self._state() / JOURNAL_FILE).new_lines()


def _changed(path: Path) -> int:
    return path.stat().st_mtime_ns if path.exists() else 0


@contextlib.contextmanager
def _attempt(store: Store, job: str, runtime: str) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", "fedsft_assets_tests.faults.worker", str(store.home), job, runtime]
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


def _wait_until_gone(mark: str) -> None:
    """What a killed worker leaves ends by itself."""
    deadline = time.monotonic() + 60
    while (left := marked_processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    if left:
        raise RuntimeError(f"processes {[process.pid for process in left]} were left behind")


def _log(store: Store, job: str) -> Path:
    return store.home / "logs" / f"{job}-{os.getpid()}.log"
