"""Attempts to bring one execution of a job to its end while faults are injected into it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from fedsft_assets.federation.job_folder import JobFolder
from fedsft_assets.federation.runtimes.processes import marked_processes
from fedsft_assets.federation.supervisor.workspace import Workspace, Workspaces
from fedsft_assets.store import Store
from fedsft_assets.versions import current
from fedsft_assets_tests.faults.faults import SITE_TIMEOUT, Fault, Kind, Plan, Target, When
from fedsft_assets_tests.faults.repairs import Repairs
from fedsft_assets_tests.faults.systems import Group, System
from fedsft_assets_tests.faults.view import View
from fedsft_assets_tests.faults.worker import LOST, REFUSED

_LOOK_SECONDS = 0.01
_SECONDS_OF_START_SCRIPTS = 10.0  # until they have seen what is gone, or what they are asked for
_TRACEBACK = "Traceback (most recent call last)"
_LINES_TO_SHOW = 30
# A server waits so long for a site that starts; no timeout of the campaign's systems is longer.
_PATIENCE = 300.0
_BY_LOAD = 4.0  # so many times what an execution without faults takes may go by beside all waiting


class WrongError(RuntimeError):
    """An attempt that did not end as one may after its faults."""


class TooLongError(RuntimeError):
    """An attempt that waits longer than the settings say."""


@dataclass
class Attempts:
    """`seconds` is what the job takes without faults; `hit` is told of every fault that hit, and how.

    `stopped` says whether to give up: then KeyboardInterrupt is raised.
    """

    system: System
    store: Store
    job: str
    seconds: float
    hit: Callable[[Fault, str], object]
    stopped: Callable[[], bool]
    number: int = 0
    _deadline: float = 0.0
    _begun: float = 0.0
    _repairs: Repairs = field(init=False)

    def __post_init__(self) -> None:
        self._repairs = Repairs(self.system)

    @property
    def workspace(self) -> Workspace:
        """That of the current version of the job folder in this runtime, which need not be there yet."""
        return workspace_of(current(self.store.job_folder(self.job)), self.store, self.system.name)

    @property
    def log(self) -> Path:
        """What the last attempt printed."""
        return self.store.home / "logs" / f"{self.system.name}-{self.job}.log"

    @property
    def end_of_log(self) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LINES_TO_SHOW:])

    def run(self, plan: Plan) -> bool:
        """Attempts until one ends well; returns whether one was refused. Raises WrongError or TooLongError."""
        injected, refused = 0, False
        try:
            while True:
                faults = [] if refused else next(plan.attempts)[: plan.count - injected]
                disturbed = self._repairs.is_open
                code, hits = self._attempt(faults)
                injected += len(hits)
                disturbed = disturbed or bool(hits)
                if code == 0:
                    return refused
                if code not in _expected(hits) or not disturbed:
                    raise WrongError(f"attempt {self.number} ended with {code} after {_said(hits)}:\n{self.end_of_log}")
                self._require_no_traceback(code)
                if code == REFUSED:
                    if refused:
                        raise WrongError(f"refused again when all was back:\n{self.end_of_log}")
                    refused = True
                    self.settle()
        finally:
            self._repairs.run(all_at_once=True)

    def settle(self) -> None:
        """Have everything back. Raises WrongError if something does not come."""
        self._repairs.run(all_at_once=True)
        try:
            self.system.settle()
        except TimeoutError as error:
            raise WrongError(f"not everything came back: {error}") from error

    def undisturbed(self) -> None:
        """One attempt without any fault, of which nobody knows how long it takes. Raises WrongError."""
        code, _ = self._attempt([])
        if code != 0:
            raise WrongError(f"{self.job} ended with {code} without any fault:\n{self.end_of_log}")

    def _attempt(self, faults: list[Fault]) -> tuple[int, list[Fault]]:
        """Its exit code, and those of the faults that hit."""
        self.number += 1
        hits: list[Fault] = []
        before = [fault for fault in faults if fault.when == When.BEFORE]
        with contextlib.ExitStack() as stack:
            self._begun = time.monotonic()
            self._wait_for(0.0)
            view = View(self.workspace, self.system.states(self.workspace.runtime))
            for fault in before:
                hits += [fault] if self._inject(fault, None, view) else []
            worker = stack.enter_context(self._worker())
            for fault in faults[len(before) :]:
                if not self._inject(fault, worker, view):
                    break
                hits.append(fault)
            while (code := worker.poll()) is None:
                self._look()
        killed = {fault.target for fault in hits if fault.kind == Kind.KILL}
        if not {Target.WORKER, Target.SUPERVISOR} <= killed:  # else the next attempt ends what they left
            self._wait_until_gone()
        return code, hits

    def _look(self) -> None:
        """What is to be done all the time."""
        if self.stopped():
            raise KeyboardInterrupt
        self._repairs.run()
        if time.monotonic() > self._deadline:
            raise TooLongError(
                f"attempt {self.number} takes more than {self._deadline - self._begun:.0f} s:\n{self.end_of_log}"
            )
        time.sleep(_LOOK_SECONDS)

    def _wait_for(self, seconds: float) -> None:
        """From now on, waiting may take what the settings say, beside so many seconds in which something is gone."""
        self._deadline = time.monotonic() + seconds + SITE_TIMEOUT + _PATIENCE + _BY_LOAD * self.seconds

    def _inject(self, fault: Fault, worker: "subprocess.Popen[bytes] | None", view: View) -> bool:
        """Wait for the fault's moment and its target; False if the attempt ended before."""
        begun = time.monotonic()
        due: float | None = None
        soon = fault.when in (When.NEXT, When.BEFORE)
        while (worker and worker.poll() is None) or (soon and time.monotonic() < begun + fault.amount + 0.2):
            if due is None and (after := view.due(fault)) is not None:
                due = time.monotonic() + after
            if due is not None and time.monotonic() >= due and (who := self._hit(fault, worker)):
                self._wait_for(fault.seconds)
                self.hit(fault, f"{time.monotonic() - self._begun:.1f} s into attempt {self.number}: {fault}; {who}")
                return True
            self._look()
        return False

    def _hit(self, fault: Fault, worker: "subprocess.Popen[bytes] | None") -> str:
        """Who was hit; empty if there is nobody."""
        groups = [group for group in self._groups(fault.target, worker) if group.processes]
        if not groups:
            return ""
        group = groups[int(fault.pick * len(groups))]
        if not self._is_done(fault.kind, group):
            return ""
        if fault.kind == Kind.FREEZE:
            self._repairs.thaw(group.processes, fault.seconds)
        else:
            if fault.target in (Target.SERVER_MACHINE, Target.SITE_MACHINE):
                self.system.remove(group.participants[0])  # what they started meanwhile
            for name in group.participants:
                self._repairs.start(name, fault.seconds or _SECONDS_OF_START_SCRIPTS)
        pids = ", ".join(str(process.pid) for process in group.processes)
        return f"{', '.join(group.participants)} (pid {pids})".strip()

    def _groups(self, target: Target, worker: "subprocess.Popen[bytes] | None") -> list[Group]:
        own = [psutil.Process(worker.pid)] if worker and worker.poll() is None else []
        if target == Target.WORKER:
            return [Group(own)]
        groups = self.system.groups(target, self._mark)
        if target == Target.EVERYTHING:
            return [Group([*own, *group.processes], group.participants) for group in groups]
        return groups

    def _is_done(self, kind: Kind, group: Group) -> bool:
        """Whether it could be done to the group."""
        if kind == Kind.STOP:
            self.system.stop_by_script(group.participants[0])
            return True
        sign = signal.SIGSTOP if kind == Kind.FREEZE else signal.SIGKILL
        hit = [process for process in group.processes if _sent(process, sign)]
        return bool(hit)

    @contextlib.contextmanager
    def _worker(self) -> Iterator["subprocess.Popen[bytes]"]:
        module = "fedsft_assets_tests.faults.worker"
        command = [sys.executable, "-m", module, str(self.store.home), self.job, self.system.name]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, **self.system.environment}
        with self.log.open("wb") as output:
            worker = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, cwd=Path(__file__).parents[2], env=environment
            )
        try:
            yield worker
        finally:
            if worker.poll() is None:
                worker.kill()
                worker.wait()

    def _wait_until_gone(self) -> None:
        """What a killed worker leaves ends by itself."""
        while marked_processes(self._mark):
            self._look()
            time.sleep(0.1)

    @property
    def _mark(self) -> str:
        return str(self.workspace.folder)

    def _require_no_traceback(self, code: int) -> None:
        """An error of ours says what and what to do. Of what died, NVFlare's own log may be told."""
        said = self.log.read_text(encoding="utf-8", errors="replace")
        if (code == REFUSED and _TRACEBACK in said) or "the job's supervisor ended with exit code 1" in said:
            raise WrongError(f"attempt {self.number} ended with a traceback:\n{self.end_of_log}")


def workspace_of(job_folder: Path, store: Store, runtime: str) -> Workspace:
    """The workspace in which a version of a job folder is executed in a runtime."""
    job = JobFolder.read(job_folder)
    base_model = job.base_model.parent.name
    subject = {"runtime": runtime, "job_folder": job_folder.name, "base_model": base_model}
    return Workspaces(store.flare(job.spec.name)).of(subject)


def _sent(process: psutil.Process, sign: signal.Signals) -> bool:
    """Whether it was there to get the signal."""
    try:
        process.send_signal(sign)
    except psutil.NoSuchProcess:
        return False
    return True


def _expected(hits: list[Fault]) -> set[int]:
    """The exit codes with which an attempt may end after these faults, beside 0."""
    killed = {fault.target for fault in hits if fault.kind == Kind.KILL}
    return {-signal.SIGKILL} if killed & {Target.WORKER, Target.EVERYTHING} else {LOST, REFUSED}


def _said(hits: list[Fault]) -> str:
    return "; ".join(map(str, hits)) or "nothing"
