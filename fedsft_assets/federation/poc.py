"""The runtime `poc`: an NVFlare system of processes on this machine, provisioned, started, repaired and stopped by us.

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
from pydantic import BaseModel, ConfigDict, Field

from fedsft_assets.federation.exchange import STATE_ROOT
from fedsft_assets.federation.flare import FlareJobs, Timeouts
from fedsft_assets.federation.phases import JOB_STARTED
from fedsft_assets.federation.processes import MARK, marked_processes, stop_marked
from fedsft_assets.federation.runtime import UnavailableError
from fedsft_assets.federation.tail import Tail

HOST = "127.0.0.1"
SERVER = "localhost"  # NVFlare binds the name it is provisioned with; this one is loopback, any other is all interfaces
ADMIN = "admin@fedsft.local"
# Of what a site's part of a job is made, those that NVFlare does not let a site run unless it is told to.
SITE_COMPONENTS = (
    "nvflare.app_common.executors.client_api_executor.ClientAPIExecutor",
    "fedsft_assets.federation.installed_trainer.InstalledTrainer",
)
STATE_FOLDER = "fedsft"  # in which the server part of a job keeps its state, in the server's folder
_PROJECT = "fedsft"
_ORG = "fedsft"
_STATE = "poc.json"
_LOCK = "lock"
_CONSOLE = "console.log"
_GRACE_SECONDS = 3.0
_ABORT_SECONDS = 4.0
_VALID_SECONDS = 180 * 24 * 3600  # NVFlare's certificates are good for twice as long
_CLIENT_OUTCOME_SECONDS = "20"  # how long a server waits for the last word of a site that died; NVFlare's own is 900
_DEAD_SITE_SECONDS = "5"  # how long a site whose part of a job is gone may come back; NVFlare's own is 60
_SERVER_SETTINGS = {"heart_beat_timeout": 60, "admin_timeout": 30.0}
# While a job waits for its turn or for GPUs. NVFlare's own: 10 s, then ever longer, and given up after ten times.
_SCHEDULER = {"min_schedule_interval": 1.0, "max_schedule_interval": 5.0, "max_schedule_count": 10_000}


class PocSettings(BaseModel):
    """How the processes of a POC are started."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gpus: str = Field(
        default="",
        pattern=r"^\s*(\d+\s*(,\s*\d+\s*)*)?$",
        description="for the sites in turn, as 0,1; none: all see all",
    )
    gpu_memory: float = Field(default=0, ge=0, description="GiB of each GPU that jobs may ask for")
    threads: int = Field(default=0, ge=0, description="of each trainer; 0 shares the cores among the sites")
    max_jobs: int = Field(default=4, ge=1, description="jobs at the same time; more wait")

    @property
    def gpu_ids(self) -> list[int]:
        return [int(gpu) for gpu in self.gpus.split(",") if gpu.strip()]


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
    def said(self) -> str:
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
        self._settings = settings
        self._environment = environment

    @property
    def admin_kit(self) -> Path:
        return self.folder / "kits" / ADMIN

    def site_folder(self, name: str) -> Path:
        """Where NVFlare's `server` or a site lives."""
        return self.folder / "kits" / (SERVER if name == "server" else name)

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
        if " " in str(self.folder):
            raise UnavailableError(
                f"{self.folder}: NVFlare starts no jobs in a folder with a space in its path; set FEDSFT_HOME"
            )
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
        self._provision(state)
        self._write(state)
        return state

    def _new_state(self, sites: list[str], port: int | None = None) -> _State:
        return _State(
            folder=str(self.folder),
            port=port or _free_port(),
            sites=sites,
            settings={**self._settings.model_dump(mode="json"), "site_components": list(SITE_COMPONENTS)},
            nvflare=importlib.metadata.version("nvflare"),
            prepared=time.time(),
        )

    def _fits(self, state: _State) -> bool:
        fresh = self._new_state([], port=state.port)
        return (
            (state.folder, state.settings, state.nvflare) == (fresh.folder, fresh.settings, fresh.nvflare)
            and time.time() - state.prepared < _VALID_SECONDS
            and all(self.site_folder(name).is_dir() for name in ("server", ADMIN, *state.sites))
        )

    def _with_a_free_port(self, state: _State) -> _State:
        """The same POC, at another port if someone else has taken its own while it was stopped."""
        if _is_free(state.port):
            return state
        self._remove()
        state = self._new_state(state.sites)
        self._provision(state)
        self._write(state)
        return state

    def _remove(self) -> None:
        """Kits and all that goes with them; results of earlier jobs stay."""
        for name in ("kits", "provision"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / _STATE).unlink(missing_ok=True)

    def _provision(self, state: _State) -> None:
        """Make the kits that are not there yet, all with the same certificate authority."""
        import yaml

        workspace, kits = self.folder / "provision", self.folder / "kits"
        workspace.mkdir(parents=True, exist_ok=True)
        kits.mkdir(exist_ok=True)
        project = workspace / "project.yml"
        project.write_text(yaml.safe_dump(_project(state)), encoding="utf-8")
        code = (
            "import sys; from nvflare.tool.poc.poc_commands import get_prod_dir, local_provision;"
            "local_provision([], 0, sys.argv[1], '', False, sys.argv[2]);"
            "print(get_prod_dir(sys.argv[1], sys.argv[3]))"
        )
        command = [sys.executable, "-c", code, str(workspace), str(project), _PROJECT]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=self._process_environment())
        if done.returncode != 0:
            raise UnavailableError(f"NVFlare could not provision the POC in {self.folder}:\n{done.stderr[-4000:]}")
        made = Path(done.stdout.splitlines()[-1])
        for name in (SERVER, ADMIN, *state.sites):
            if not (kits / name).is_dir():
                (made / name).rename(kits / name)
                self._configure(kits / name, name, state)
        shutil.rmtree(made)

    def _configure(self, kit: Path, name: str, state: _State) -> None:
        """Write `local/resources.json`, in which a site's own settings go before those that NVFlare provisions."""
        default = kit / "local" / "resources.json.default"
        content = json.loads(default.read_text(encoding="utf-8"))
        components = {component["id"]: component for component in content.get("components", [])}
        if name == SERVER:
            content["servers"][0].update(_SERVER_SETTINGS)
            content["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(self.folder / "snapshots")
            components["job_manager"]["args"]["uri_root"] = str(self.folder / "jobs")
            (self.folder / "states").mkdir(exist_ok=True)
            (kit / STATE_FOLDER).symlink_to(self.folder / "states")  # kits are made anew, unfinished executions are not
            components["job_scheduler"]["args"] = {**_SCHEDULER, "max_jobs": self._settings.max_jobs}
        elif name != ADMIN:
            gpus = self._gpus(state, name)
            components["resource_manager"]["args"].update(
                num_of_gpus=len(gpus), mem_per_gpu_in_GiB=self._settings.gpu_memory
            )
            content["class_allow_list"] = [*content["class_allow_list"], *SITE_COMPONENTS]
        default.with_name("resources.json").write_text(json.dumps(content, indent=2), encoding="utf-8")

    def _gpus(self, state: _State, site: str) -> list[int]:
        """As NVFlare's POC does: the GPUs go round the sites, or the sites round the GPUs."""
        gpus, count, at = self._settings.gpu_ids, len(state.sites), state.sites.index(site)
        if not gpus:
            return []
        return [gpus[at % len(gpus)]] if len(gpus) <= count else gpus[at::count]

    def _launch(self, state: _State, name: str) -> Service:
        kit = self.folder / "kits" / name
        environment = self._process_environment()
        if name == SERVER:
            # NVFlare would start the server part of jobs again that ended with the last server, and no other part.
            shutil.rmtree(self.folder / "snapshots", ignore_errors=True)
            environment["NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT"] = _CLIENT_OUTCOME_SECONDS
            environment["NVFLARE_DEAD_CLIENT_GRACE_PERIOD"] = _DEAD_SITE_SECONDS
        else:
            share = max(1, (os.cpu_count() or 1) // len(state.sites))
            environment["OMP_NUM_THREADS"] = str(self._settings.threads or share)
            if gpus := self._gpus(state, name):
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
        """Without what belongs to the one job that it may be started for, whose mark too: it lives longer than that."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        inherited = {name: value for name, value in os.environ.items() if name not in (JOB_STARTED, STATE_ROOT)}
        return {**inherited, **self._environment, "PATH": path, MARK: self.mark}

    def _stop(self) -> int:
        count = stop_marked(self.mark, grace=_GRACE_SECONDS)
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


class Poc(FlareJobs):
    """Jobs in the POC of `system`, which is started when a job needs it and goes on when the job has ended."""

    _what_to_do = "look at `fedsft poc status`, and start it anew: fedsft poc stop; fedsft poc start"

    def __init__(self, system: PocSystem, folder: Path, timeouts: Timeouts | None = None) -> None:
        super().__init__(system.admin_kit, folder, timeouts=timeouts or Timeouts(connect=120, sites=120))
        self._system = system

    def prepare(self, sites: list[str]) -> None:
        if SERVER in self._system.start(sites):
            self._drop_session()
        super().prepare(sites)

    def end_of_log(self, job_id: str, name: str, lines: int) -> str:
        """From the disk; the server's is in the job's result once that is complete."""
        log = self._system.site_folder(name) / job_id / "log.txt"
        return Tail(log).end(lines) if log.is_file() else super().end_of_log(job_id, name, lines)

    def abort(self, job_id: str) -> None:
        """What NVFlare has not ended after a few seconds is ended by force."""
        try:
            super().abort(job_id)
        except UnavailableError:
            if not self._hopeless():
                raise
        finally:
            self._system.end_job(job_id)

    def _hasten(self, job_id: str, waited: float) -> None:
        if waited > _ABORT_SECONDS:
            self._system.end_job(job_id)

    def _hopeless(self) -> str:
        if self._system.started(SERVER) < float("inf"):
            return ""
        what = f"the server of the POC in {self._system.folder} does not run; {self._what_to_do}"
        return f"{what}\n{self._system.end_of_console('server')}"

    def _connected(self) -> set[str]:
        """Without sites that the server still has by a process that is gone."""
        clients = self._ask(lambda session: session.get_connected_client_list())
        return {c.name for c in clients if c.last_connect_time >= self._system.started(c.name)}

    def _ended(self, missing: list[str]) -> list[str]:
        return [site for site in missing if self._system.started(site) == float("inf")]

    def _missing_sites(self, missing: list[str]) -> str:
        return "\n".join([super()._missing_sites(missing), *map(self._system.end_of_console, missing)])


_started: list[subprocess.Popen[bytes]] = []  # held, so that Python neither warns of them nor waits for them


def _alive(state: _State, name: str) -> int | None:
    service = state.services.get(name)
    return service.pid if service and service.process else None


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _project(state: _State) -> dict[str, Any]:
    """NVFlare's description of a project, with the server and its admin at one port."""
    server: dict[str, Any] = {"name": SERVER, "type": "server", "fed_learn_port": state.port, "admin_port": state.port}
    sites: list[dict[str, Any]] = [{"name": site, "type": "client"} for site in state.sites]
    admin: dict[str, Any] = {"name": ADMIN, "type": "admin", "role": "project_admin"}
    return {
        "api_version": 3,
        "name": _PROJECT,
        "description": "one machine",
        "participants": [{**participant, "org": _ORG} for participant in (server, *sites, admin)],
        "builders": [
            {
                "path": "nvflare.lighter.impl.workspace.WorkspaceBuilder",
                "args": {"template_file": ["master_template.yml"]},
            },
            {"path": "nvflare.lighter.impl.static_file.StaticFileBuilder", "args": {"config_folder": "config"}},
            {"path": "nvflare.lighter.impl.cert.CertBuilder"},
            {"path": "nvflare.lighter.impl.signature.SignatureBuilder"},
        ],
    }


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
