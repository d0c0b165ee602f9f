"""What a runtime offers to the supervisor of a job: NVFlare's simulator, a POC, or a production federation.

All runtimes take the same job folder and return the same files. The server part of a job writes a journal
(`journal.jsonl`), whose new lines a runtime returns while the job runs.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


class UnavailableError(RuntimeError):
    """The runtime cannot run or find a job: unreachable, not started, sites missing. The message says what to do."""


class RefusedError(UnavailableError):
    """The user lacks a right, whatever the job. The message names it."""


class ResultLostError(UnavailableError):
    """The runtime does not have the result of an ended job; the server's saved state may still have it."""


@dataclass(frozen=True)
class JobState:
    """`status` is in the runtime's own terms: a FLARE status, or an exit code.

    `waiting`: submitted but not started, so silence is expected. `forbidden`: a participant's policy does not allow the
    job, so submitting it again is useless.
    """

    ended: bool
    succeeded: bool
    status: str
    waiting: bool = False
    forbidden: bool = False


class Runtime(Protocol):
    """One execution of one job. Every method but `close` may raise UnavailableError."""

    survives_submitter: bool
    """Whether a job keeps running when the process that submitted it dies, so that another can reattach to it."""

    def gather(self, sites: list[str], at_least: int) -> Iterator[str]:
        """Start or reach what the job needs, and wait until `at_least` of the sites are connected.

        Yields a message for each missing site. Once enough are connected, the others are waited for only briefly.
        """

    def submit(self, job_folder: Path, token: str) -> str:
        """Submit the job; returns its FLARE job id, which is valid in any process.

        Where jobs survive their submitter, submitting a token again returns the job of the first time, whatever its
        state: so a process that does not know whether its submission arrived can repeat it.
        """

    def poll(self, job_id: str) -> JobState:
        """The state of the job. A job that the runtime does not know has ended without success."""

    def new_lines(self, job_id: str) -> list[str]:
        """Complete lines of the server's journal that this object has not returned yet. Raises RefusedError too."""

    def journal(self, job_id: str) -> list[str] | None:
        """The whole journal of an ended job; None if it is not available."""

    def end_of_log(self, job_id: str, name: str, lines: int) -> str:
        """The last lines of the log of `server` or a site; empty if it is not available."""

    def abort(self, job_id: str) -> None:
        """Abort the job and return when all its processes have ended. No error for a job that has ended."""

    def fetch(self, job_id: str, into: Path) -> None:
        """Copy the files of an ended job's server part into the folder `into`. Raises ResultLostError too."""

    def command(self, module: str) -> tuple[list[str], dict[str, str]]:
        """The command and environment that run a module of this package here."""

    def close(self) -> None:
        """Close connections without affecting the job."""
