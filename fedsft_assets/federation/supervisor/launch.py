"""Starts the supervisor of a job, reads its events, and makes sure that no process is left behind."""

import logging
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from fedsft_assets.federation.job_folder import JobFolder, JobFolderError, verify_job_folder
from fedsft_assets.federation.protocol.events import Event, Failed, JobError, decode
from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.federation.runtimes.processes import MARK, execution_mark, stop_marked
from fedsft_assets.federation.supervisor.workspace import Execution, Workspace, Workspaces
from fedsft_assets.files import folder_digest
from fedsft_assets.process_env import child_environment, home_environment
from fedsft_assets.specs.runtime import SIMULATOR, RuntimeSettings
from fedsft_assets.versions import existing

_SECONDS_TO_ABORT = 14.0  # a FLARE job ends in half that time

_log = logging.getLogger(__name__)


@contextmanager
def held_workspace(job: JobFolder, workspaces: Path, runtime: str) -> Iterator[tuple[Workspace, Execution]]:
    """Lock the workspace of this job folder and runtime, and yield it with the execution to complete.

    `workspaces` is the folder of all workspaces of the job. The lock is held for the block; another run of the same job
    folder waits and logs that it does. Workspaces of other job folders are not touched, except that their abandoned
    FLARE jobs are ended before the next submission, since sites run one job at a time. Raises JobError as
    `begin_execution` does.
    """
    subject = _usable_subject(job, runtime)
    everyone = Workspaces(workspaces)
    workspace = everyone.of(subject)

    def waiting() -> None:
        _log.info("waiting for another run of the same job with the same inputs")

    with workspace.held(waiting=waiting):
        abandoned = {}
        for other in everyone.abandoned():
            last = other.execution()
            if last and last.subject.get("runtime") == runtime and last.unfinished_jobs:
                abandoned[other] = last
        superseded = [job_id for last in abandoned.values() for job_id in last.unfinished_jobs]
        execution = _begin(workspace, subject, superseded)
        for other, last in abandoned.items():
            other.save(replace(last, stopped=True, superseded=[]))
        yield workspace, execution


def begin_execution(job: JobFolder, workspace: Path, runtime: str) -> Execution:
    """The unfinished execution of this job folder and runtime, or a new one.

    A new execution starts in an empty workspace; the caller must be its only user. Raises JobError if the base model is
    missing or was modified.
    """
    return _begin(Workspace(workspace), _usable_subject(job, runtime))


def _begin(workspace: Workspace, subject: dict[str, str], superseded: Sequence[str] = ()) -> Execution:
    """`superseded` are FLARE jobs to end first."""
    stop_marked(str(workspace.folder))  # orphans of an earlier attempt
    return workspace.resume_or_create(subject, superseded)


def subject_of(job: JobFolder, runtime: str) -> dict[str, str]:
    """Identifies what is executed: the job folder refers to its base model and data by digest."""
    return {"runtime": runtime, "job_folder": job.digest, "base_model": job.base_model.parent.name}


def _usable_subject(job: JobFolder, runtime: str) -> dict[str, str]:
    """The subject. Raises JobError if the base model is missing or was modified, or private data is elsewhere."""
    if runtime != "production" and (absent := job.absent_private_sites):
        raise JobError(
            f"{job.path}: the data of {', '.join(absent)} is private and not on this machine; run the job where it"
            " is, in the runtime 'production'"
        )
    base_model = job.base_model.parent
    try:
        unchanged = folder_digest(existing(base_model)) == base_model.name
    except FileNotFoundError as error:
        raise JobError(str(error)) from error
    if not unchanged:
        raise JobError(f"{base_model}: modified since it was written; materialize base_model again")
    return subject_of(job, runtime)


def read_job_folder(path: Path) -> JobFolder:
    """Raises JobError if the job folder is missing, modified or from another version of this package."""
    try:
        verify_job_folder(path)
        return JobFolder.read(path)
    except (JobFolderError, FileNotFoundError) as error:
        raise JobError(str(error)) from error


def run_job(
    job: JobFolder | Path,
    workspace: Path,
    testing_file: Path,
    into: Path,
    runtime: RuntimeSettings = SIMULATOR,
    execution: Execution | None = None,
) -> Iterator[Event]:
    """Run a job to completion, yielding its events; the last one is the JobReport.

    `job` is a job folder in a home's store, which also has its data and base model, or its path; `execution` is the
    result of `begin_execution`, if the caller has called it. An unfinished execution resumes after its last finished
    round; the caller calls `Workspace.end` when nothing is left to do. The checkpoint and its report are written to
    `into`. Closing the iterator, or an exception in the caller, stops the job. Raises JobError if the job fails, after
    all its processes have ended.
    """
    job = job if isinstance(job, JobFolder) else read_job_folder(job)
    if execution is None:
        begin_execution(job, workspace, runtime.name)
    mark = execution_mark(str(workspace))
    command = [
        *(sys.executable, "-m", "fedsft_assets.federation.supervisor.supervisor"),
        *("--job-folder", str(job.path), "--workspace", str(workspace)),
        *("--testing-file", str(testing_file), "--into", str(into), "--runtime", runtime.model_dump_json()),
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
            env={**child_environment(), **home_environment(job.home), MARK: mark},
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
        raise JobError(last.reason, last.retryable)
    if code != 0 or not isinstance(last, JobReport):
        stderr_text = errors.read_text(encoding="utf-8", errors="replace").strip()
        raise JobError(f"the job's supervisor ended with exit code {code}:\n{stderr_text[-4000:]}", retryable=code < 0)
