"""The lifecycle of a POC: an NVFlare system of processes on this machine, started, repaired and stopped by us.

All it writes is in one folder, it listens on loopback only, and several of them on one machine do not meet.
"""

import contextlib
import fcntl
import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from fedsft_assets.access import close_to_others
from fedsft_assets.federation.kit_policy import CONNECTION, SERVER_CLASSES, SERVER_CONNECTIONS, SITE_CLASSES
from fedsft_assets.federation.protocol.messages import STATE_ROOT
from fedsft_assets.federation.protocol.phases import JOB_STARTED
from fedsft_assets.federation.protocol.tail import Tail
from fedsft_assets.federation.runtimes.interface import UnavailableError
from fedsft_assets.federation.runtimes.poc.kits import ADMIN, SERVER, PocKits
from fedsft_assets.federation.runtimes.processes import MARK, marked_processes, stop_marked
from fedsft_assets.process_env import child_environment
from fedsft_assets.specs.runtime import PocSettings

HOST = "127.0.0.1"
_STATE = "poc.json"
_LOCK = "lock"
_CONSOLE = "console.log"
_GRACE_SECONDS = 3.0
_VALID_SECONDS = 180 * 24 * 3600  # NVFlare's certificates are good for twice as long
_CLIENT_OUTCOME_SECONDS = "20"  # how long a server waits for the last word of a site that died; NVFlare's own is 900
_DEAD_SITE_SECONDS = "5"  # how long a site whose part of a job is gone may come back; NVFlare's own is 60


@dataclass(frozen=True)
class Service:
    """A process of the POC: which one it is, even when its pid has been given to another since."""

    pid: int
    created: float

    @property
    def process(self) -> psutil.Process | None:
        """The living process, or None."""
        try:
            process = psutil.Process(self.pid)
            alive = abs(process.create_time() - self.created) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return None
        return process if alive else None


@dataclass(frozen=True)
class PocStatus:
    """`services` maps `localhost`, which is the server, and every site to its pid, or None if it does not run."""

    folder: Path
    address: str
    services: dict[str, int | None]
    jobs: list[str] = field(default_factory=list)
    """FLARE job ids that have processes now."""

    @property
    def state(self) -> str:
        running = [name for name, pid in self.services.items() if pid]
        if not self.services:
            return "not prepared"
        if not running:
            return "stopped"
        return "running" if len(running) == len(self.services) else "incomplete"


@dataclass
class _State:
    """What is written down about a POC, in `poc.json`."""

    folder: str
    port: int
    sites: list[str]
    settings: dict[str, Any]
    nvflare: str
    prepared: float
    services: dict[str, Service] = field(default_factory=dict)


class PocSystem:
    """The lifecycle of the POC in `folder`. Any process may hold one of these; all see the same POC.

    `environment` is what its processes get beside that of this one. `sites` are there from the start, whichever
    of them the first job needs: they share the cores.
    """

    def __init__(
        self, folder: Path, settings: PocSettings, environment: Mapping[str, str], sites: Iterable[str] = ()
    ) -> None:
        self.folder = folder
        self.sites = frozenset(sites)
        self._kits = PocKits(folder, settings)
        self._settings = settings
        self._environment = environment

    @property
    def admin_kit(self) -> Path:
        return self._kits.of(ADMIN)

    def site_folder(self, name: str) -> Path:
        """Where NVFlare's `server` or a site lives."""
        return self._kits.of(name)

    @property
    def mark(self) -> str:
        """What the processes of this POC carry in their environment."""
        return f"poc {self.folder}"

    def prepare(self, sites: Iterable[str] = ()) -> None:
        """Make the startup kits of the server, an admin and the sites that have none. Starts nothing.

        Raises UnavailableError.
        """
        with self._locked():
            self._prepare(sites)

    def start(self, sites: Iterable[str] = ()) -> list[str]:
        """Start what does not run: the server and all sites that were ever asked for, with new ones now.

        Running sites and jobs go on, unless the settings are others: then the POC is started anew, if it
        has no job. Returns what was started, `localhost` for the server. Raises UnavailableError.
        """
        with self._locked():
            state = self._prepare(sites)
            if state.services.get(SERVER, Service(0, 0)).process is None:
                self._stop()
                state.services = {}
                state = self._with_a_free_port(state)
            missing = [name for name in (SERVER, *state.sites) if not _alive(state, name)]
            for name in missing:
                state.services[name] = self._launch(state, name)
                self._write(state)
        return missing

    def renew(self) -> None:
        """Make the startup kits anew, under another certificate authority: what has a key of before gets in no more.

        Ends all processes of this POC, with the jobs that run in it. Raises UnavailableError.
        """
        with self._locked():
            state = self._read()
            self._stop()
            self._remove()
            self._prepare(state.sites if state else ())

    def stop(self) -> int:
        """End every process of this POC, politely and then by force. Returns how many there were."""
        if not self.folder.is_dir():  # somebody removed it, which ends no process
            return stop_marked(self.mark, grace=_GRACE_SECONDS)
        with self._locked():
            return self._stop()

    def status(self) -> PocStatus:
        state = self._read()
        if state is None:
            return PocStatus(self.folder, "", {})
        pids = {name: _alive(state, name) for name in (SERVER, *state.sites)}
        return PocStatus(self.folder, f"{HOST}:{state.port}", pids, self._jobs())

    def started(self, name: str) -> float:
        """When the process of a site or of `localhost` began, in seconds since the epoch; infinity if it is gone."""
        state = self._read()
        service = state.services.get(name) if state else None
        return service.created if service and service.process else float("inf")

    def end_of_console(self, name: str, lines: int = 15) -> str:
        """The last lines that NVFlare's `server` or a site printed."""
        log = self.site_folder(name) / _CONSOLE
        return f"The end of {log}:\n{Tail(log).end(lines)}"

    def end_job(self, job_id: str) -> None:
        """End all processes of a job by force, also those that they start meanwhile."""
        while processes := self.job_processes(job_id):
            _kill(processes)
            time.sleep(0.1)

    def job_processes(self, job_id: str) -> list[psutil.Process]:
        """Every process of a job: those of NVFlare that run its parts, and all that these started."""
        found = []
        for process in marked_processes(self.mark):
            with contextlib.suppress(psutil.Error):
                if job_id in process.cwd() or any(job_id in word for word in process.cmdline()):
                    found.append(process)
        return found

    def _jobs(self) -> list[str]:
        jobs = set()
        for process in marked_processes(self.mark):
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                jobs |= {words[i + 1] for i, word in enumerate(words[:-1]) if word == "-n" and "nvflare" in str(words)}
        return sorted(jobs)

    def _prepare(self, sites: Iterable[str]) -> _State:
        state = self._read()
        wanted = {*self.sites, *sites}
        if state is not None and not self._fits(state):
            if jobs := self._jobs():
                raise UnavailableError(
                    f"the POC in {self.folder} was started with other settings and has {len(jobs)} running jobs;"
                    " wait for these, or stop it: fedsft poc stop"
                )
            self._stop()
            self._remove()
            wanted |= set(state.sites)
            state = None
        if state is None:
            if not wanted:
                raise UnavailableError("a POC needs at least one site; none was named")
            self._remove()
            state = self._new_state(sorted(wanted))
        elif more := wanted - set(state.sites):
            state.sites = sorted({*state.sites, *more})
        else:
            return state
        return self._made(state)

    def _made(self, state: _State) -> _State:
        """The state, with the kits that it is about, written down."""
        self._kits.provision(state.sites, state.port, self._process_environment())
        close_to_others(self.folder)  # NVFlare has its scripts executable for everybody
        self._write(state)
        return state

    def _new_state(self, sites: list[str], port: int | None = None) -> _State:
        return _State(
            folder=str(self.folder),
            port=port or _free_port(),
            sites=sites,
            settings={
                **self._settings.model_dump(mode="json"),
                "allowed": [*SERVER_CLASSES, *SITE_CLASSES],
                "components": [CONNECTION, SERVER_CONNECTIONS],
            },
            nvflare=importlib.metadata.version("nvflare"),
            prepared=time.time(),
        )

    def _fits(self, state: _State) -> bool:
        fresh = self._new_state([], port=state.port)
        return (
            (state.folder, state.settings, state.nvflare) == (fresh.folder, fresh.settings, fresh.nvflare)
            and time.time() - state.prepared < _VALID_SECONDS
            and self._kits.complete(state.sites)
        )

    def _with_a_free_port(self, state: _State) -> _State:
        """The same POC, at another port if someone else has taken its own while it was stopped."""
        if _is_free(state.port):
            return state
        self._remove()
        return self._made(self._new_state(state.sites))

    def _remove(self) -> None:
        """What it is started from; results of earlier jobs stay."""
        self._kits.remove()
        (self.folder / _STATE).unlink(missing_ok=True)

    def _launch(self, state: _State, name: str) -> Service:
        kit = self._kits.of(name)
        environment = self._process_environment()
        if name == SERVER:
            # NVFlare would start the server part of jobs again that ended with the last server, and no other part.
            shutil.rmtree(self.folder / "snapshots", ignore_errors=True)
            self._temporary.mkdir(exist_ok=True)
            environment["TMPDIR"] = str(self._temporary)
            environment["NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT"] = _CLIENT_OUTCOME_SECONDS
            environment["NVFLARE_DEAD_CLIENT_GRACE_PERIOD"] = _DEAD_SITE_SECONDS
        else:
            share = max(1, (os.cpu_count() or 1) // len(state.sites))
            environment["OMP_NUM_THREADS"] = str(self._settings.threads or share)
            if gpus := self._settings.gpus_of(name, state.sites):
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        with (kit / _CONSOLE).open("ab") as console:
            process = subprocess.Popen(
                [str(kit / "startup" / "sub_start.sh"), "--once"],  # it becomes the Python process, and starts no other
                cwd=kit,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        _started.append(process)
        return Service(process.pid, psutil.Process(process.pid).create_time())

    def _process_environment(self) -> dict[str, str]:
        """Without what belongs to the one job that it may be started for, whose mark too: it lives longer than that.

        And without secrets, which are not for sites.
        """
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        inherited = {
            name: value for name, value in child_environment().items() if name not in (JOB_STARTED, STATE_ROOT)
        }
        return {**inherited, **self._environment, "PATH": path, MARK: self.mark}

    @property
    def _temporary(self) -> Path:
        """For the server alone, which leaves sites' logs there of jobs that were killed."""
        return self.folder / "temporary"

    def _stop(self) -> int:
        count = stop_marked(self.mark, grace=_GRACE_SECONDS)
        shutil.rmtree(self._temporary, ignore_errors=True)
        state = self._read()
        if state is not None and state.services:
            state.services = {}
            self._write(state)
        return count

    def _read(self) -> _State | None:
        """None if there is no POC, or one that was made elsewhere and copied to here."""
        try:
            content = json.loads((self.folder / _STATE).read_text(encoding="utf-8"))
            services = {name: Service(**service) for name, service in content.pop("services").items()}
            state = _State(**content, services=services)
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return state if state.folder == str(self.folder) else None

    def _write(self, state: _State) -> None:
        fresh = self.folder / f"{_STATE}.new"
        fresh.write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")
        os.replace(fresh, self.folder / _STATE)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time changes the POC; the others wait, and find it done."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


_started: list[subprocess.Popen[bytes]] = []  # held, so that Python neither warns of them nor waits for them


def _alive(state: _State, name: str) -> int | None:
    service = state.services.get(name)
    return service.pid if service and service.process else None


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
