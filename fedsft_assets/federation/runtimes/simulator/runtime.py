"""The runtime `simulator`: NVFlare's simulator on a job folder, in a process of its own; run as a module, that process.

On Linux, the processes of sites and trainers are forked from a server that has imported what they need, so that a job
starts in seconds and a site needs little memory.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from fedsft_assets.federation.kit_policy import write_simulation_policy
from fedsft_assets.federation.protocol.journal import JOURNAL_FILE, Finished, from_line
from fedsft_assets.federation.protocol.messages import (
    BEST_MODEL,
    EXECUTION_KEY,
    LAST_MODEL,
    SITE_STATE_ROOT,
    STATE_ROOT,
)
from fedsft_assets.federation.protocol.phases import JOB_STARTED
from fedsft_assets.federation.protocol.tail import Tail
from fedsft_assets.federation.runtimes.interface import JobState, UnavailableError
from fedsft_assets.federation.runtimes.plain_path import plain_path
from fedsft_assets.federation.runtimes.processes import MARK, stop_marked
from fedsft_assets.federation.runtimes.simulator.fork_server import ForkServer, can_fork
from fedsft_assets.federation.site.cpu_slots import TURNS, make_turns
from fedsft_assets.memory import MESSAGE_ENVIRONMENT
from fedsft_assets.process_env import child_environment

_JOB_ID = "simulate_job"  # NVFlare's id of a simulated job
_MAX_SITES_PER_SLOT = 3  # without CPU slots; a few sites share the cores freely, which keeps all cores busy
# Imported by the fork server, in this order: for the simulation, for processes of sites, for trainers.
_SIMULATION = (
    "fedsft_assets.federation.runtimes.simulator.nvflare_simulator",
    "fedsft_assets.federation.server.controller",
    "nvflare.fuel.f3.drivers.aio_grpc_driver",
    "nvflare.fuel.f3.drivers.aio_http_driver",
)
_SITES = (
    "fedsft_assets.federation.runtimes.simulator.site",
    "nvflare.client.cell.api",
    "nvflare.app_common.executors.client_api.external_process_backend",
    "fedsft_assets.federation.site.executor",
    "torch._dynamo",  # a third of what follows; imported separately, so that sites start before the rest
    "fedsft_assets.model.training.packed_attention",
    "fedsft_assets.federation.site.trainer",
    "fedsft_assets.federation.site.process",
)


class Simulator:
    """One job in NVFlare's simulator; its processes end with the supervisor."""

    survives_submitter = False

    def __init__(self, folder: Path, threads_per_trainer: int, base_model: Path) -> None:
        """`folder` takes all files; trainers begin with the archive `base_model`.

        Trainers with more threads than their share of the cores slow each other down.
        """
        self._folder, self._threads, self._base_model = folder, threads_per_trainer, base_model
        self._process: subprocess.Popen[bytes] | None = None
        self._forks: ForkServer | None = None
        self._journal = self._ending = Tail(folder / JOURNAL_FILE)
        self._sites: list[str] = []
        self._links = ExitStack()
        self._plain: Path | None = None  # the path of the folder for NVFlare

    def gather(self, sites: list[str], at_least: int) -> Iterator[str]:  # noqa: ARG002 all are started with the job
        """Raises UnavailableError if there is no path to the folder that NVFlare can use."""
        self._sites = sites
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._plain is None:
            try:
                self._plain = self._links.enter_context(plain_path(self._folder))
            except OSError as error:
                raise UnavailableError(
                    f"{self._folder}: NVFlare cannot use this path, and no link to it could be made: {error}"
                ) from error
        yield from ()

    def submit(self, job_folder: Path, token: str) -> str:  # noqa: ARG002 no other process reattaches
        environment = self._environment()
        assert self._plain, "call gather before submit"
        if can_fork():
            self._forks = self._forks or ForkServer(self._plain / "python", _SIMULATION, _SITES, self._base_model)
            self._forks.start(environment)
            environment |= self._forks.environment
            python = self._forks.python
        else:
            installed = self._links.enter_context(plain_path(Path(sys.prefix)))
            python = installed / Path(sys.executable).relative_to(sys.prefix)
        environment["PATH"] = f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"
        execution = json.loads((job_folder / "meta.json").read_text(encoding="utf-8"))[EXECUTION_KEY]
        journal = self._states / execution / JOURNAL_FILE
        self._journal = Tail(journal)
        self._ending = Tail(journal, journal.stat().st_size if journal.exists() else 0)
        for folder in (self._workspace, self._temporary):
            shutil.rmtree(folder, ignore_errors=True)
        self._temporary.mkdir()
        write_simulation_policy(self._workspace)
        at_once = max(1, (os.cpu_count() or 1) // self._threads)
        if len(self._sites) > _MAX_SITES_PER_SLOT * at_once:
            make_turns(self._turns, at_once)
            environment[TURNS] = str(self._turns)
        named = self._links.enter_context(plain_path(job_folder.parent)) / job_folder.name
        command = [str(python), "-u", "-m", __name__, str(python), str(named), str(self._workspace), *self._sites]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        return _JOB_ID

    def poll(self, job_id: str) -> JobState:  # noqa: ARG002 there is one job
        if self._process is None:
            return JobState(ended=True, succeeded=False, status="no simulator process")
        if any(isinstance(from_line(line), Finished) for line in self._ending.new_lines()):
            self._end()  # everything is on the disk, and its own shutdown is slow
            return JobState(ended=True, succeeded=True, status="finished")
        code = self._process.poll()
        return JobState(ended=code is not None, succeeded=False, status=f"exit code {code}")

    def new_lines(self, job_id: str) -> list[str]:  # noqa: ARG002
        return self._journal.new_lines()

    def journal(self, job_id: str) -> list[str] | None:  # noqa: ARG002
        return Tail(self._journal.path).new_lines() or None

    def end_of_log(self, job_id: str, name: str, lines: int) -> str:  # noqa: ARG002
        return Tail(self._log if name == "server" else self._workspace / name / "log.txt").end(lines)

    def abort(self, job_id: str) -> None:  # noqa: ARG002
        self._end()

    def fetch(self, job_id: str, into: Path) -> None:
        os.link(self._journal.path, into / JOURNAL_FILE)
        for name in (BEST_MODEL, LAST_MODEL):
            os.link(self._workspace / "server" / job_id / name, into / name)

    def command(self, module: str) -> tuple[list[str], dict[str, str]]:
        """Forked if a job was submitted; an attempt that finds the job's result has no fork server."""
        if self._forks:
            return [str(self._forks.python), "-m", module], {**child_environment(), **self._forks.environment}
        return [sys.executable, "-m", module], child_environment()

    def close(self) -> None:
        if self._forks:
            self._forks.stop()
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._links.close()

    def _end(self) -> None:
        """End the simulation with all its processes, except the fork server, which `command` may still use."""
        stop_marked(os.environ[MARK], spare=[self._forks.pid] if self._forks else [])
        if self._process:
            self._process.wait()

    def _environment(self) -> dict[str, str]:
        return {
            **child_environment(),
            **MESSAGE_ENVIRONMENT,
            "OMP_NUM_THREADS": str(self._threads),
            "TMPDIR": str(self._temporary),
            "NVFLARE_DEAD_CLIENT_GRACE_PERIOD": "1",  # seconds; no site returns here; NVFlare's default: 60
            JOB_STARTED: str(time.time()),
            STATE_ROOT: str(self._states),
            SITE_STATE_ROOT: str(self._folder / "site_states"),
        }

    @property
    def _workspace(self) -> Path:
        return (self._plain or self._folder) / "nvflare"

    @property
    def _states(self) -> Path:
        return self._folder / "states"

    @property
    def _turns(self) -> Path:
        return self._folder / "turns"

    @property
    def _temporary(self) -> Path:
        return self._folder / "tmp"

    @property
    def _log(self) -> Path:
        return self._folder / "simulator.log"


def main() -> None:
    from fedsft_assets.federation.runtimes.simulator.nvflare_simulator import Simulation

    parser = argparse.ArgumentParser(description="Run a job folder in NVFlare's simulator.")
    parser.add_argument("python", help="the executable for the processes of sites")
    parser.add_argument("job_folder")
    parser.add_argument("workspace")
    parser.add_argument("sites", nargs="+")
    args = parser.parse_args()
    sys.executable = args.python  # NVFlare starts the sites with it
    runner = Simulation(
        args.job_folder,
        args.workspace,
        clients=",".join(args.sites),
        threads=len(args.sites),
        max_clients=len(args.sites),
        log_config="concise",
    )
    result: dict[str, int] = {}
    runner.run_process(result)  # `run` would start another process for it
    sys.stdout.flush()
    os._exit(result["run_status"])  # NVFlare's threads would keep the interpreter alive


if __name__ == "__main__":
    main()
