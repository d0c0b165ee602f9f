"""The operator's files of one execution of a job, from which a later attempt resumes.

The subject of an execution is one job folder, which identifies its base model and data, in one runtime. It ends when
its checkpoint is registered; until then every attempt to run the job resumes it. An execution is one history: an
unbroken chain of server states under one id, with one journal, one checkpoint and one set of MLflow runs. If the chain
breaks, a new execution starts. Each subject has its own workspace, used by one process at a time.
"""

import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from fedsft_assets.files import locked_file, publish_file

_FILE = "execution.json"
_NAME_LENGTH = 16  # hexadecimal digits of a subject's digest in the name of its workspace


@dataclass(frozen=True)
class Execution:
    """The state of an execution: `rounds` finished, `seconds` spent in all attempts so far.

    `attempts` has, for each attempt, its start in seconds since the epoch and the seconds of all earlier ones.

    `subject` says what is executed. `submissions` counts submissions, `job_id` is the FLARE job of the last one, once
    known; `stopped`: its server gave up, or has lost the result. `status` is the runtime's status of a successful job,
    set once its files are in the workspace; `checkpoint` is the digest of the archive built from them; `ended`: nothing
    is left to do. `superseded` are abandoned FLARE jobs of other executions that may still be running.
    """

    id: str
    subject: dict[str, str]
    submissions: int = 0
    job_id: str | None = None
    stopped: bool = False
    rounds: int = 0
    seconds: float = 0.0
    attempts: list[list[float]] = field(default_factory=list)
    status: str | None = None
    checkpoint: str | None = None
    ended: bool = False
    superseded: list[str] = field(default_factory=list)

    @property
    def unfinished_jobs(self) -> list[str]:
        """FLARE jobs that may still be running."""
        if self.ended:
            return []
        own = [self.job_id] if self.job_id and not self.status and not self.stopped else []
        return [*self.superseded, *own]

    @property
    def token(self) -> str:
        """Idempotency key of the last submission."""
        return f"{self.id}-{self.submissions}"


class Workspaces:
    """The folder of a job's workspaces, one for each subject."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, subject: dict[str, str]) -> "Workspace":
        name = hashlib.sha256(json.dumps(subject, sort_keys=True).encode()).hexdigest()
        return Workspace(self._folder / name[:_NAME_LENGTH])

    def has_unfinished(self, subject: dict[str, str]) -> bool:
        """Whether the last execution of the subject has not ended."""
        last = self.of(subject).execution()
        return last is not None and not last.ended

    def latest(self) -> "Workspace | None":
        """The most recently used workspace, or None."""
        records = sorted(self._folder.glob(f"*/{_FILE}"), key=lambda path: path.stat().st_mtime)
        return Workspace(records[-1].parent) if records else None

    def abandoned(self) -> Iterator["Workspace"]:
        """Workspaces that no process is using, the caller included; each is locked while it is yielded."""
        for folder in sorted(self._folder.glob("*/")):
            workspace = Workspace(folder)
            try:
                with workspace.held(wait=False):
                    yield workspace
            except BlockingIOError:
                continue


class Workspace:
    """The folder for successive executions of one subject."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def held(self, wait: bool = True, waiting: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Lock this folder for the block. If another process holds it, call `waiting` and wait.

        Raises BlockingIOError if it is locked and `wait` is false. The lock of a dead process is released.
        """
        lock = self.folder.with_suffix(".lock")
        with ExitStack() as held:
            try:
                held.enter_context(locked_file(lock, wait=False))
            except BlockingIOError:
                if not wait:
                    raise
                waiting()
                held.enter_context(locked_file(lock))
            yield

    @property
    def tracking_record(self) -> Path:
        """The MLflow record of the last execution; beside the folder, which a new execution empties."""
        return self.folder.with_suffix(".tracking.json")

    @property
    def checkpoint(self) -> Path:
        """The final archive and its report."""
        return self.folder / "checkpoint"

    @property
    def submitted(self) -> Path:
        """The job folder as it was submitted."""
        return self.folder / "submitted"

    @property
    def result(self) -> Path:
        """The files downloaded from the job's server."""
        return self.folder / "result"

    @property
    def runtime(self) -> Path:
        """The runtime's own files."""
        return self.folder / "runtime"

    @property
    def journal(self) -> Path:
        """The local copy of the server's journal."""
        return self.folder / "journal.jsonl"

    def execution(self) -> Execution | None:
        """The last execution, if any."""
        path = self.folder / _FILE
        try:
            return Execution(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            return None  # written by another version of this package: cannot be resumed

    def resume_or_create(self, subject: dict[str, str], superseded: Sequence[str] = ()) -> Execution:
        """The unfinished execution of the subject, or a new one in an emptied folder."""
        last = self.execution()
        if last and not last.ended and last.subject == subject:
            return self.save(replace(last, superseded=[*last.superseded, *superseded])) if superseded else last
        shutil.rmtree(self.folder, ignore_errors=True)
        return self.save(Execution(uuid.uuid4().hex, subject, superseded=[*superseded]))

    def save(self, execution: Execution) -> Execution:
        with publish_file(self.folder / _FILE) as path:
            path.write_text(json.dumps(asdict(execution), indent=2), encoding="utf-8")
        return execution

    def begin_anew(self) -> Execution:
        """Start a new execution of the same subject after the server lost the last one's state.

        Removes the last one's files first. If this process is killed in between, the last execution's record still has
        its finished rounds.
        """
        last = self.execution()
        assert last, "there is an execution that cannot continue"
        self.journal.unlink(missing_ok=True)
        shutil.rmtree(self.result, ignore_errors=True)
        return self.save(Execution(uuid.uuid4().hex, last.subject, superseded=last.unfinished_jobs))

    def end(self) -> None:
        """Mark the execution as done: the next one starts from the beginning."""
        if last := self.execution():
            self.save(replace(last, ended=True))


class ExecutionRecord:
    """The current execution, saved at every change, with the total time of all attempts."""

    def __init__(self, workspace: Workspace) -> None:
        execution = workspace.execution()
        assert execution, "run_job begins an execution before it starts a supervisor"
        self._workspace, self._execution = workspace, execution
        self._begun, self._seconds_before = time.monotonic(), execution.seconds
        self._attempts = [*execution.attempts, [time.time(), execution.seconds]]

    @property
    def now(self) -> Execution:
        """The current state."""
        return self._execution

    @property
    def seconds(self) -> float:
        """Total time of the execution so far, over all attempts."""
        return self._seconds_before + time.monotonic() - self._begun

    def seconds_at(self, moment: float) -> float:
        """The part of `seconds` until a moment in seconds since the epoch; pauses between attempts do not count."""
        ends = [*(before for _, before in self._attempts[1:]), self.seconds]
        attempts = zip(self._attempts, ends, strict=True)
        passed = [min(before + moment - begun, end) for (begun, before), end in attempts if begun <= moment]
        return passed[-1] if passed else 0.0

    def save(self, **changes: object) -> None:
        """Update these fields and save."""
        changed = replace(self._execution, seconds=self.seconds, attempts=self._attempts, **changes)  # type: ignore[arg-type]
        self._execution = self._workspace.save(changed)

    def begin_anew(self) -> None:
        """Start a new history from round zero."""
        self._execution = self._workspace.begin_anew()
