"""What a place where jobs run offers to the supervisor of one: the simulator, a POC, or a production federation.

All take the same job folder and give back the same files. The server part of a job writes down what happens
in its journal (`journal.jsonl`), of which a runtime hands on new lines while the job runs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class UnavailableError(RuntimeError):
    """The runtime cannot take or find a job: unreachable, not started, sites missing. The message says what to do."""


class RefusedError(UnavailableError):
    """The runtime does not let this user do it, whatever the job does. The message names the right."""


class ResultLostError(UnavailableError):
    """The runtime does not have what an ended job made; its server's state may still have it."""


@dataclass(frozen=True)
class JobState:
    """`status` is the runtime's own word for it: a FLARE status, or an exit code.

    `waiting`: the job has not begun, so it has nothing to say yet. `forbidden`: a participant's policy does not let it
    run, however often it is submitted.
    """

    ended: bool
    succeeded: bool
    status: str
    waiting: bool = False
    forbidden: bool = False


class Runtime(Protocol):
    """One execution of one job. Every method but `close` may raise UnavailableError."""

    survives_submitter: bool
    """Whether a submitted job goes on when the process that submitted it dies, so that another can take over."""

    def gather(self, sites: list[str], at_least: int) -> Iterator[str]:
        """Make ready what the job needs: started, reached, and with so many of these sites connected.

        Tells who is missing as soon as it is known. Once so many are there, the others are not waited for long.
        """

    def submit(self, job_folder: Path, token: str) -> str:
        """Hand in the job; returns its FLARE job id, by which any process can ask for it from now on.

        Where a job outlives its submitter, a token that was used before gives the job of that time, however it is
        with it now: another process that does not know whether the job was taken hands it in again.
        """

    def poll(self, job_id: str) -> JobState:
        """Whether the job has ended, and how. A job that the runtime does not know has ended without success."""

    def new_lines(self, job_id: str) -> list[str]:
        """Whole lines of the server's journal that this object has not handed out yet. Raises RefusedError too."""

    def journal(self, job_id: str) -> list[str] | None:
        """All lines of the journal of a job that has ended; None where nobody has all of it."""

    def end_of_log(self, job_id: str, name: str, lines: int) -> str:
        """The last lines of what `server` or a site logged, as far as it can be had from here; may be empty."""

    def abort(self, job_id: str) -> None:
        """End the job; returns when nothing of it runs any more. No error if it has ended already."""

    def fetch(self, job_id: str, into: Path) -> None:
        """Put the files of the server part of the ended job into the folder `into`. Raises ResultLostError too."""

    def command(self, module: str) -> tuple[list[str], dict[str, str]]:
        """How a module of this package starts here as a process, and with what environment."""

    def close(self) -> None:
        """Let go of connections. The job is not touched."""
