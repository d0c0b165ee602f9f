"""What the operator's side keeps of one execution of a job, so that a later attempt goes on with it.

An execution is of one job folder and one base model in one runtime. It ends when its checkpoint is registered; until
then every attempt to run the job takes it up again.
"""

import json
import shutil
import uuid
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from fedsft_assets.store import publish_file

_FILE = "execution.json"


@dataclass(frozen=True)
class Execution:
    """`subject` says what is executed, `rounds` are finished, `seconds` went into it in all attempts so far.

    `submissions` have been begun, of which `job_id` is the last one's FLARE job, once that is known; `stopped`: its
    server gave it up. `status` is the runtime's word for a job that has ended well, when its files are in the
    workspace; `checkpoint` the digest of the archive that was made of them; `ended`: nothing is left to do.
    `superseded` are FLARE jobs of executions before it, of other job folders, that may still run.
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
        own = [self.job_id] if self.job_id and not self.status else []
        return [*self.superseded, *own]

    @property
    def token(self) -> str:
        """By which a server knows the last submission, however often it is handed in."""
        return f"{self.id}-{self.submissions}"


class Workspace:
    """The folder of a job in which its executions happen, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

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

    def take_up(self, subject: dict[str, str]) -> Execution:
        """The execution to go on with; if there is none of that subject, a new one in an empty folder."""
        last = self.execution()
        if last and not last.ended and last.subject == subject:
            return last
        superseded = last.unfinished_jobs if last and last.subject.get("runtime") == subject.get("runtime") else []
        shutil.rmtree(self.folder, ignore_errors=True)
        return self.save(Execution(uuid.uuid4().hex, subject, superseded=superseded))

    def save(self, execution: Execution) -> Execution:
        with publish_file(self.folder / _FILE) as path:
            path.write_text(json.dumps(asdict(execution), indent=2), encoding="utf-8")
        return execution

    def end(self) -> None:
        """Nothing is left to do: the next execution starts anew."""
        if last := self.execution():
            self.save(replace(last, ended=True))
