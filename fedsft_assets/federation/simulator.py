"""The runtime `simulator`: NVFlare's simulator over a job folder, in a process of its own.

Started as a module, it is that process.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from fedsft_assets.federation.metrics import METRICS_FILE
from fedsft_assets.federation.phases import JOB_STARTED

_RUN = "server/simulate_job"


class Simulator:
    """One job in NVFlare's simulator, all its files in `workspace`."""

    def __init__(self, job_folder: Path, workspace: Path, sites: list[str]) -> None:
        self._job_folder = job_folder
        self._workspace = workspace
        self._sites = sites
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log_file(self) -> Path:
        """What the simulator prints."""
        return self._workspace.with_suffix(".log")

    @property
    def site_logs(self) -> dict[str, Path]:
        """NVFlare's log of each site, with all that the site's trainer prints."""
        return {site: self._workspace / site / "log.txt" for site in self._sites}

    @property
    def run_dir(self) -> Path:
        """Where the server part of the job writes."""
        return self._workspace / _RUN

    @property
    def metrics_file(self) -> Path:
        return self.run_dir / METRICS_FILE

    def start(self, threads_per_trainer: int) -> None:
        """Start the job. Each trainer uses so many threads: trainers that take all cores slow each other down."""
        shutil.rmtree(self._workspace, ignore_errors=True)  # an earlier execution's points are not this one's
        self._workspace.parent.mkdir(parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads_per_trainer),
            JOB_STARTED: str(time.time()),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }
        command = [sys.executable, "-m", __name__, str(self._job_folder), str(self._workspace), *self._sites]
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
            )

    def poll(self) -> int | None:
        """The exit code, or None while the job runs."""
        assert self._process is not None, "start() comes first"
        return self._process.poll()


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
