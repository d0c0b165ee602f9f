"""Starting the supervisor of a job, listening to it, and making sure that nothing of it stays behind."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from fedsft_assets.federation.events import Event, Failed, decode
from fedsft_assets.federation.processes import MARK, execution_mark, stop_marked
from fedsft_assets.federation.report import JobReport


class JobError(RuntimeError):
    """The job failed; the message says why, with the trainer's traceback where there is one."""


def run_job(
    job_folder: Path,
    workspace: Path,
    testing_file: Path,
    into: Path,
    threads: int = 0,
    environment: dict[str, str] | None = None,
) -> Iterator[Event]:
    """Run a job to its end, yielding what happens; the last event is the JobReport.

    The checkpoint and its report are then in `into`. Closing the iterator, or any exception in the
    caller, stops the job. Raises JobError if the job fails, after all its processes have ended.
    """
    stop_marked(str(workspace))  # what an earlier attempt left, whose parents were all killed
    mark = execution_mark(str(workspace))
    command = [
        *(sys.executable, "-m", "fedsft_assets.federation.supervisor"),
        *("--job-folder", str(job_folder), "--workspace", str(workspace)),
        *("--testing-file", str(testing_file), "--into", str(into), "--threads", str(threads)),
    ]
    errors = workspace.with_suffix(".err")
    errors.parent.mkdir(parents=True, exist_ok=True)
    last: Event | None = None
    with errors.open("wb") as stderr:
        supervisor = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, **(environment or {}), MARK: mark},
        )
    try:
        assert supervisor.stdout is not None
        for line in supervisor.stdout:
            last = decode(line)
            yield last
        code = supervisor.wait()
    finally:
        stop_marked(mark)
        supervisor.wait()
    if isinstance(last, Failed):
        raise JobError(last.reason)
    if code != 0 or not isinstance(last, JobReport):
        said = errors.read_text(encoding="utf-8", errors="replace").strip()
        raise JobError(f"the supervisor of the job ended with exit code {code}:\n{said[-4000:]}")
