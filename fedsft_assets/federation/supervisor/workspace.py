"""What the operator's side keeps of one execution of a job, so that a later attempt goes on with it.

An execution is of one job folder, which names its base model and data, in one runtime: that is its subject. It ends
when its checkpoint is registered; until then every attempt to run the job takes it up again. It is one history: an
unbroken chain of states at its server, under its id, with one journal, one checkpoint and one set of MLflow runs. Where
that chain breaks, another execution begins. Each subject has a workspace of its own, and one process at a time works in
it.
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

from fedsft_assets.files import locked, publish_file

_FILE = "execution.json"
_NAME_LENGTH = 16  # hexadecimal digits of a subject's digest in the name of its workspace


@dataclass(frozen=True)
class Execution:
    """`subject` says what is executed, `rounds` are finished, `seconds` went into it in all attempts so far.

    `submissions` have been begun, of which `job_id` is the last one's FLARE job, once that is known; `stopped`: its
    server gave it up, or does not have what it made. `status` is the runtime's word for a job that has ended well,
    when its files are in the workspace; `checkpoint` the digest of the archive that was made of them; `ended`: nothing
    is left to do. `superseded` are FLARE jobs of other executions that nobody follows any more and that may still run.
    """

    id: str
    subject: dict[str, str]
    submissions: int = 0
    job_id: str | None = None
    stopped: bool = False
    rounds: int = 0
    seconds: float = 0.0
    status: str | None = None
    checkpoint: str | None = None
    ended: bool = False
    superseded: list[str] = field(default_factory=list)

    @property
    def unfinished_jobs(self) -> list[str]:
        """FLARE jobs that may still run."""
        if self.ended:
            return []
        own = [self.job_id] if self.job_id and not self.status and not self.stopped else []
        return [*self.superseded, *own]

    @property
    def token(self) -> str:
        """By which a server knows the last submission, however often it is handed in."""
        return f"{self.id}-{self.submissions}"


class Workspaces:
    """The folder of a job's workspaces, one for each subject."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, subject: dict[str, str]) -> "Workspace":
        name = hashlib.sha256(json.dumps(subject, sort_keys=True).encode()).hexdigest()
        return Workspace(self._folder / name[:_NAME_LENGTH])

    def latest(self) -> "Workspace | None":
        """That of the execution that was begun or went on last; None before the first."""
        records = sorted(self._folder.glob(f"*/{_FILE}"), key=lambda path: path.stat().st_mtime)
        return Workspace(records[-1].parent) if records else None

    def abandoned(self) -> Iterator["Workspace"]:
        """Those in which no process works now, the caller's included, and none begins to while it is looked at."""
        for folder in sorted(self._folder.glob("*/")):
            workspace = Workspace(folder)
            try:
                with workspace.held(wait=False):
                    yield workspace
            except BlockingIOError:
                continue


class Workspace:
    """The folder in which executions of one subject happen, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def held(self, wait: bool = True, waiting: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Be the one process that works in this folder; the next one waits, after a call of `waiting`.

        Raises BlockingIOError if another does and `wait` is false. A process that dies lets go.
        """
        lock = self.folder.with_suffix(".lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.touch()
        with ExitStack() as held:
            try:
                held.enter_context(locked(lock, wait=False))
            except BlockingIOError:
                if not wait:
                    raise
                waiting()
                held.enter_context(locked(lock))
            yield

    @property
    def tracking_record(self) -> Path:
        """What MLflow is to know of the last execution, beside the folder, which is emptied at a new start."""
        return self.folder.with_suffix(".tracking.json")

    @property
    def checkpoint(self) -> Path:
        """The archive that the execution ends with, and its report."""
        return self.folder / "checkpoint"

    @property
    def submitted(self) -> Path:
        """The job folder as it was submitted."""
        return self.folder / "submitted"

    @property
    def result(self) -> Path:
        """What the server part of the job left."""
        return self.folder / "result"

    @property
    def runtime(self) -> Path:
        """For the runtime's own files."""
        return self.folder / "runtime"

    @property
    def journal(self) -> Path:
        """This side's copy of the server's journal."""
        return self.folder / "journal.jsonl"

    def execution(self) -> Execution | None:
        """The last one, if there was any."""
        path = self.folder / _FILE
        try:
            return Execution(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            return None  # of another version of this package: nothing that could be gone on with

    def resume_or_create(self, subject: dict[str, str], superseded: Sequence[str] = ()) -> Execution:
        """The execution to go on with; if there is none, a new one in a folder with nothing of the one before."""
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
        """Another execution of the same subject, from zero: what the last one had at its server is gone.

        Nothing of the last one is left to be taken for the new one's. Were this process killed in between, the last
        one would still know that it had finished rounds.
        """
        last = self.execution()
        assert last, "there is one that cannot go on"
        self.journal.unlink(missing_ok=True)
        shutil.rmtree(self.result, ignore_errors=True)
        return self.save(Execution(uuid.uuid4().hex, last.subject, superseded=last.unfinished_jobs))

    def end(self) -> None:
        """Nothing is left to do: the next execution starts anew."""
        if last := self.execution():
            self.save(replace(last, ended=True))


class ExecutionRecord:
    """The execution that is under way, on the disk at every change, with the time that all attempts took."""

    def __init__(self, workspace: Workspace) -> None:
        execution = workspace.execution()
        assert execution, "run_job begins an execution before it starts a supervisor"
        self._workspace, self._execution = workspace, execution
        self._begun, self._seconds_before = time.monotonic(), execution.seconds

    @property
    def now(self) -> Execution:
        """As it stands."""
        return self._execution

    @property
    def seconds(self) -> float:
        """That went into the execution up to now, in this attempt and all before."""
        return self._seconds_before + time.monotonic() - self._begun

    def save(self, **changes: object) -> None:
        """Change these fields."""
        changed = replace(self._execution, seconds=self.seconds, **changes)  # type: ignore[arg-type]
        self._execution = self._workspace.save(changed)

    def begin_anew(self) -> None:
        """Another history begins, from zero."""
        self._execution = self._workspace.begin_anew()
