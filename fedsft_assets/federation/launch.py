"""Starting the supervisor of a job, listening to it, and making sure that nothing of it stays behind."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from fedsft_assets.federation.events import Event, Failed, JobError, decode
from fedsft_assets.federation.job_folder import JobFolderError, read_plans, read_spec, verify_job_folder
from fedsft_assets.federation.processes import MARK, execution_mark, stop_marked
from fedsft_assets.federation.record import Execution, Workspace
from fedsft_assets.federation.report import JobReport
from fedsft_assets.store import file_digest, folder_digest

_SECONDS_TO_ABORT = 14.0  # a FLARE job takes half as long to end


def begin_execution(job_folder: Path, workspace: Path, runtime: str) -> Execution:
    """The unfinished execution of this very job folder and base model in that runtime, or else a new one.

    A new one begins in an empty workspace. Raises JobError if the job folder is not as it was built, or its base
    model is missing.
    """
    stop_marked(str(workspace))  # what an earlier attempt left, whose parents were all killed
    try:
        verify_job_folder(job_folder)
        _require_data(job_folder, runtime)
        subject = {
            "runtime": runtime,
            "job_folder": folder_digest(job_folder),
            "base_model": file_digest(read_plans(job_folder)[0].base_model),
        }
    except (JobFolderError, FileNotFoundError) as error:
        raise JobError(str(error)) from error
    return Workspace(workspace).take_up(subject)


def _require_data(job_folder: Path, runtime: str) -> None:
    """Raises JobError for sites whose data nobody has who takes part in that runtime."""
    private = read_spec(job_folder).private_sites
    absent = [plan.site for plan in read_plans(job_folder) if plan.site in private and not plan.training_file.is_file()]
    if absent and runtime != "production":
        raise JobError(
            f"{job_folder}: the data of {', '.join(absent)} is private and not on this machine; run the job where it"
            " is, in the runtime 'production'"
        )


def run_job(
    job_folder: Path,
    workspace: Path,
    testing_file: Path,
    into: Path,
    runtime: str = "simulator",
    threads: int = 0,
    environment: dict[str, str] | None = None,
    execution: Execution | None = None,
) -> Iterator[Event]:
    """Run a job to its end, yielding what happens; the last event is the JobReport.

    `execution` is what `begin_execution` gave, if the caller has begun one. An execution that did not come to its end
    goes on after its last finished round; `Workspace.end` is for the caller, when nothing is left to do. The
    checkpoint and its report are in `into`. Closing the iterator, or any exception in the caller, stops the job.
    Raises JobError if the job fails, after all its processes have ended.
    """
    if execution is None:
        begin_execution(job_folder, workspace, runtime)
    mark = execution_mark(str(workspace))
    command = [
        *(sys.executable, "-m", "fedsft_assets.federation.supervisor"),
        *("--job-folder", str(job_folder), "--workspace", str(workspace)),
        *("--testing-file", str(testing_file), "--into", str(into), "--runtime", runtime, "--threads", str(threads)),
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
        stop_marked(mark, grace=_SECONDS_TO_ABORT)
        supervisor.wait()
    if isinstance(last, Failed):
        raise JobError(last.reason, last.lost)
    if code != 0 or not isinstance(last, JobReport):
        said = errors.read_text(encoding="utf-8", errors="replace").strip()
        raise JobError(f"the supervisor of the job ended with exit code {code}:\n{said[-4000:]}", lost=code < 0)
