"""The three runtimes as a campaign sees them: which processes are which target, and what starts again what is gone."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import psutil

from fedsft_assets.federation.protocol.messages import STUDY_HOME
from fedsft_assets.federation.runtimes.poc.system import PocSystem
from fedsft_assets.federation.runtimes.processes import marked_processes, stop_marked
from fedsft_assets.process_env import home_environment
from fedsft_assets.specs.runtime import PocSettings
from fedsft_assets.store import Store
from fedsft_assets_tests.faults.faults import Target
from fedsft_assets_tests.provisioned import SERVER, Federation, provision

_NVFLARE = "nvflare.private.fed.app"
_IN_ALL = {
    Target.SUPERVISOR: "fedsft_assets.federation.supervisor.supervisor",
    Target.TRAINER: "fedsft_assets.federation.site.process",
}
_IN_THE_SIMULATOR = {
    **_IN_ALL,
    Target.SERVER: "fedsft_assets.federation.runtimes.simulator.runtime",
    Target.SITE: "fedsft_assets.federation.runtimes.simulator.site",
    Target.FORK_SERVER: "fedsft_assets.federation.runtimes.simulator.fork_server",
}
_WITH_PARENTS = {
    **_IN_ALL,
    Target.SERVER: f"{_NVFLARE}.server.runner_process",
    Target.SITE: f"{_NVFLARE}.client.worker_process",
    Target.SERVER_PARENT: f"{_NVFLARE}.server.server_train",
    Target.SITE_PARENT: f"{_NVFLARE}.client.client_train",
}
_PARENTS = (Target.SERVER_PARENT, Target.SITE_PARENT)
# Of a campaign's federation, in seconds. A site that is not connected is told of soon.
_TIMEOUTS = {"CONNECT": 30.0, "RECONNECT": 120.0, "SITES": 30.0, "ABORT": 60.0}


@dataclass(frozen=True)
class Group:
    """Processes that are hit at once, and the participants whose operators have something to start again then."""

    processes: list[psutil.Process]
    participants: tuple[str, ...] = ()


class System(Protocol):
    """What jobs of a campaign run in. A trainer of a job of three sites has `trainer_threads`."""

    name: str
    trainer_threads: int

    @property
    def environment(self) -> dict[str, str]:
        """Variables of the worker."""

    @property
    def marks(self) -> list[str]:
        """Which all its processes carry that live from job to job."""

    def states(self, runtime_folder: Path) -> Path:
        """The folder of the states of executions at the server; `runtime_folder` is that of the job's workspace."""

    def start(self) -> None:
        """Have it run, as far as jobs do not start it."""

    def groups(self, target: Target, mark: str) -> list[Group]:
        """Each that is this target now; `mark` is that of the job's own processes."""

    def stop_by_script(self, name: str) -> None:
        """Have a participant stop the way its operator does it."""

    def remove(self, name: str) -> None:
        """End all of a participant at once."""

    def start_again(self, name: str, /) -> bool:
        """Start a participant, if it does not run; False while it is still about to stop."""

    def settle(self) -> None:
        """Have all that belongs to it run and be connected. Raises TimeoutError."""

    def renew(self) -> None:
        """Begin anew, without anything of earlier jobs."""

    def stop(self) -> None:
        """Leave no process."""


class SimulatorSystem:
    """Everything belongs to one job."""

    name = "simulator"
    trainer_threads = max(1, (os.cpu_count() or 1) // 3)

    def __init__(self, _store: Store) -> None:
        self.environment: dict[str, str] = {}
        self.marks: list[str] = []

    def states(self, runtime_folder: Path) -> Path:
        return runtime_folder / "states"

    def groups(self, target: Target, mark: str) -> list[Group]:
        return _groups(target, _IN_THE_SIMULATOR, [mark])

    def stop_by_script(self, name: str) -> None:
        raise NotImplementedError(f"the simulator has no {name} with scripts")

    remove = stop_by_script

    def start_again(self, _name: str) -> bool:
        return True

    def start(self) -> None:
        """Jobs start it."""

    settle = renew = stop = start


class PocUnderFire(SimulatorSystem):
    """A POC that jobs start, and start again."""

    name = "poc"

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._poc = PocSystem(store.home / "poc", PocSettings(), home_environment(store.home))
        self.marks = [self._poc.mark]

    def states(self, runtime_folder: Path) -> Path:  # noqa: ARG002 it outlives jobs
        return self._poc.folder / "states"

    def groups(self, target: Target, mark: str) -> list[Group]:
        return _groups(target, _WITH_PARENTS, [*self.marks, mark])

    def renew(self) -> None:
        self.stop()
        shutil.rmtree(self._poc.folder, ignore_errors=True)

    def stop(self) -> None:
        self._poc.stop()


class ProductionUnderFire:
    """A provisioned federation on loopback, whose operators start again what is gone."""

    name = "production"
    trainer_threads = 1

    def __init__(self, store: Store) -> None:
        self._home, self._folder = store.home, store.home / "federation"
        self._federation: Federation | None = None

    @property
    def federation(self) -> Federation:
        if self._federation is None:
            kits = provision(self._folder)
            variables = {}
            for name in (SERVER, *kits.sites):
                folder = kits.kit(name) / "tmp"
                folder.mkdir(exist_ok=True)
                variables[name] = {"TMPDIR": str(folder), STUDY_HOME: str(self._home)}  # its files are the study's
            self._federation = Federation(kits, self._folder, variables=variables)
        return self._federation

    @property
    def environment(self) -> dict[str, str]:
        timeouts = {f"FEDSFT_PRODUCTION__TIMEOUTS__{name}": str(seconds) for name, seconds in _TIMEOUTS.items()}
        return {"FEDSFT_PRODUCTION__STARTUP_KIT": str(self.federation.kits.admin), **timeouts}

    @property
    def marks(self) -> list[str]:
        return self.federation.marks

    def states(self, runtime_folder: Path) -> Path:  # noqa: ARG002 it outlives jobs
        return self.federation.kits.server / "fedsft"

    def start(self) -> None:
        self.settle()

    def groups(self, target: Target, mark: str) -> list[Group]:
        federation = self.federation
        match target:
            case Target.SERVER_MACHINE | Target.SERVER_PARENT:
                names = [SERVER]
            case Target.SITE_MACHINE | Target.SITE_PARENT:
                names = list(federation.kits.sites)
            case Target.PARENTS | Target.EVERYTHING:
                (group,) = _groups(target, _WITH_PARENTS, [*self.marks, mark])
                return [replace(group, participants=tuple(federation.names))]
            case _:
                return _groups(target, _WITH_PARENTS, [*self.marks, mark])
        groups = []
        for name in names:
            processes = marked_processes(federation.mark_of(name))
            parent = _running(_WITH_PARENTS[target], processes) if target in _PARENTS else processes
            groups.append(Group(parent, (name,)))
        return groups

    def stop_by_script(self, name: str) -> None:
        self.federation.ask_to_stop(name)

    def remove(self, name: str) -> None:
        for process in marked_processes(self.federation.mark_of(name)):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        stop_marked(self.federation.mark_of(name))

    def start_again(self, name: str) -> bool:
        federation = self.federation
        kit = federation.kits.kit(name)
        if federation.is_started(name):
            return not (kit / "shutdown.fl").exists()
        for file in ("shutdown.fl", "daemon_pid.fl", "pid.fl"):  # of what was killed, and can seem to run
            (kit / file).unlink(missing_ok=True)
        federation.start(name)
        return True

    def settle(self) -> None:
        for name in self.federation.names:
            while not self.start_again(name):
                time.sleep(0.5)
        with contextlib.redirect_stdout(io.StringIO()):  # NVFlare's client prints what it does
            self.federation.wait_until_connected()

    def renew(self) -> None:
        self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._federation = None
        self.start()

    def stop(self) -> None:
        if self._federation:
            for name in self._federation.names:
                self._federation.stop(name)


SYSTEMS: dict[str, type[SimulatorSystem] | type[ProductionUnderFire]] = {
    one.name: one for one in (SimulatorSystem, PocUnderFire, ProductionUnderFire)
}


def _groups(target: Target, words: dict[Target, str], marks: list[str]) -> list[Group]:
    """By what stands in their command lines, the oldest first."""
    processes = [process for mark in marks for process in marked_processes(mark)]
    match target:
        case Target.EVERYTHING:
            return [Group(processes)]
        case Target.SITE_PARENTS:
            return [Group(_running(words[Target.SITE_PARENT], processes))]
        case Target.PARENTS:
            return [Group([process for parent in _PARENTS for process in _running(words[parent], processes)])]
    return [Group([process]) for process in _running(words[target], processes)]


def _running(word: str, processes: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):  # ended since it was listed
            if word in process.cmdline():
                found.append((process.create_time(), process.pid, process))
    return [process for _, _, process in sorted(found, key=lambda one: one[:2])]
