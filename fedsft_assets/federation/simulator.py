"""The runtime `simulator`: NVFlare's simulator over a job folder, in a process of its own.

Started as a module, it is that process.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from fedsft_assets.federation.exchange import BEST_MODEL, EXECUTION_KEY, LAST_MODEL, SITE_STATE_ROOT, STATE_ROOT
from fedsft_assets.federation.journal import JOURNAL_FILE
from fedsft_assets.federation.phases import JOB_STARTED
from fedsft_assets.federation.processes import MARK, stop_marked
from fedsft_assets.federation.runtime import JobState
from fedsft_assets.federation.tail import Tail

_JOB_ID = "simulate_job"  # NVFlare's name for it


class Simulator:
    """One job in NVFlare's simulator, all its files in `folder`; its processes end with the supervisor's."""

    outlives = False

    def __init__(self, folder: Path, threads_per_trainer: int) -> None:
        """Each trainer uses so many threads: trainers that take all cores slow each other down."""
        self._folder, self._threads = folder, threads_per_trainer
        self._process: subprocess.Popen[bytes] | None = None
        self._journal = Tail(folder / JOURNAL_FILE)
        self._sites: list[str] = []

    def prepare(self, sites: list[str]) -> None:
        self._sites = sites
        self._folder.mkdir(parents=True, exist_ok=True)

    def submit(self, job_folder: Path, token: str) -> str:  # noqa: ARG002 nobody but this process knows the job
        execution = json.loads((job_folder / "meta.json").read_text(encoding="utf-8"))[EXECUTION_KEY]
        states = self._folder / "states"
        self._journal = Tail(states / execution / JOURNAL_FILE)
        shutil.rmtree(self._workspace, ignore_errors=True)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(self._threads),
            JOB_STARTED: str(time.time()),
            STATE_ROOT: str(states),
            SITE_STATE_ROOT: str(self._folder / "site_states"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        command = [sys.executable, "-m", __name__, str(job_folder), str(self._workspace), *self._sites]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
            )
        return _JOB_ID

    def poll(self, job_id: str) -> JobState:  # noqa: ARG002 there is one job
        if self._process is None:
            return JobState(ended=True, succeeded=False, said="its simulator is gone")
        code = self._process.poll()
        return JobState(ended=code is not None, succeeded=code == 0, said=f"exit code {code}")

    def new_lines(self, job_id: str) -> list[str]:  # noqa: ARG002
        return self._journal.new_lines()

    def end_of_log(self, job_id: str, name: str, lines: int) -> str:  # noqa: ARG002
        return Tail(self._log if name == "server" else self._workspace / name / "log.txt").end(lines)

    def abort(self, job_id: str) -> None:  # noqa: ARG002
        stop_marked(os.environ[MARK])
        if self._process:
            self._process.wait()

    def fetch(self, job_id: str, into: Path) -> None:
        for name in (JOURNAL_FILE, BEST_MODEL, LAST_MODEL):
            os.link(self._workspace / "server" / job_id / name, into / name)

    def close(self) -> None:
        pass

    @property
    def _workspace(self) -> Path:
        return self._folder / "nvflare"

    @property
    def _log(self) -> Path:
        return self._folder / "simulator.log"


def main() -> None:
    from nvflare.private.fed.app.simulator.simulator_runner import SimulatorRunner

    parser = argparse.ArgumentParser(description="Run a job folder in NVFlare's simulator.")
    parser.add_argument("job_folder")
    parser.add_argument("workspace")
    parser.add_argument("sites", nargs="+")
    args = parser.parse_args()
    runner = SimulatorRunner(
        args.job_folder, args.workspace, clients=",".join(args.sites), threads=len(args.sites), log_config="concise"
    )
    # NVFlare leaves threads behind that keep an interpreter from ending.
    sys.stdout.flush()
    os._exit(runner.run() or 0)


if __name__ == "__main__":
    main()
