"""The processes of a POC: NVFlare's server and sites, started from their kits, and their jobs' processes."""

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

from fedsft_assets.federation.protocol.messages import STATE_ROOT
from fedsft_assets.federation.protocol.phases import JOB_STARTED
from fedsft_assets.federation.runtimes.poc.kits import SERVER, PocKits
from fedsft_assets.federation.runtimes.poc.state import Service
from fedsft_assets.federation.runtimes.processes import MARK, marked_processes, stop_marked
from fedsft_assets.process_env import child_environment
from fedsft_assets.specs.runtime import PocSettings

CONSOLE = "console.log"
_GRACE_SECONDS = 3.0
_KILL_INTERVAL = 0.1
_SERVER_ENVIRONMENT = {
    "NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT": "20",  # seconds to wait for a dead site's outcome; NVFlare's default: 900
    "NVFLARE_DEAD_CLIENT_GRACE_PERIOD": "5",  # seconds for a dead site process to return; NVFlare's default: 60
}


class PocServices:
    """Starts and ends the processes of the POC in `folder`; `environment` is added to theirs."""

    def __init__(self, folder: Path, kits: PocKits, settings: PocSettings, environment: Mapping[str, str]) -> None:
        self._folder, self._kits, self._settings, self._environment = folder, kits, settings, environment

    @property
    def mark(self) -> str:
        """The mark in the environment of all processes of this POC."""
        return f"poc {self._folder}"

    def environment(self) -> dict[str, str]:
        """Environment of the POC's processes: without secrets, and without variables of the job that starts the POC.

        That includes the job's process mark, since the POC outlives the job.
        """
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        inherited = {
            name: value for name, value in child_environment().items() if name not in (JOB_STARTED, STATE_ROOT)
        }
        return {**inherited, **self._environment, "PATH": path, MARK: self.mark}

    def launch(self, name: str, sites: list[str]) -> Service:
        """Start the server (`localhost`) or one of the POC's sites."""
        kit = self._kits.of(name)
        environment = self.environment()
        if name == SERVER:
            # NVFlare would restore the server process, but not the sites', of jobs that ended with the last server.
            shutil.rmtree(self._folder / "snapshots", ignore_errors=True)
            self._temporary.mkdir(exist_ok=True)
            environment |= {**_SERVER_ENVIRONMENT, "TMPDIR": str(self._temporary)}
        else:
            environment |= self._resources(name, sites)
        with (kit / CONSOLE).open("ab") as console:
            process = subprocess.Popen(
                [str(kit / "startup" / "sub_start.sh"), "--once"],  # replaced by the Python process, without a restart
                cwd=kit,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        _started.append(process)
        return Service(process.pid, psutil.Process(process.pid).create_time())

    def stop(self) -> int:
        """End all processes, by force after a grace period. Returns how many there were."""
        count = stop_marked(self.mark, grace=_GRACE_SECONDS)
        shutil.rmtree(self._temporary, ignore_errors=True)
        return count

    def running_jobs(self) -> list[str]:
        """Ids of the FLARE jobs that have processes now."""
        jobs = set()
        for _, words in self._command_lines():
            jobs |= {words[i + 1] for i, word in enumerate(words[:-1]) if word == "-n" and "nvflare" in str(words)}
        return sorted(jobs)

    def job_processes(self, job_id: str) -> list[psutil.Process]:
        """All processes of a job: NVFlare's processes, and all that these started."""
        found = []
        for process, words in self._command_lines():
            with contextlib.suppress(psutil.Error):
                if job_id in process.cwd() or any(job_id in word for word in words):
                    found.append(process)
        return found

    def kill_job(self, job_id: str) -> None:
        """Kill all processes of a job, including those that they start meanwhile."""
        while processes := self.job_processes(job_id):
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(_KILL_INTERVAL)

    def _command_lines(self) -> Iterator[tuple[psutil.Process, list[str]]]:
        for process in marked_processes(self.mark):
            with contextlib.suppress(psutil.Error):
                yield process, process.cmdline()

    def _resources(self, site: str, sites: list[str]) -> dict[str, str]:
        share = max(1, (os.cpu_count() or 1) // len(sites))
        resources = {"OMP_NUM_THREADS": str(self._settings.threads or share)}
        if gpus := self._settings.gpus_of(site, sites):
            resources["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, gpus))
        return resources

    @property
    def _temporary(self) -> Path:
        """For the server only, which leaves site logs of killed jobs there."""
        return self._folder / "temporary"


_started: list[subprocess.Popen[bytes]] = []  # referenced here so that Python neither warns about nor reaps them
