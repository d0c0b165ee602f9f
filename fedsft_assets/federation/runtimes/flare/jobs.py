"""Jobs in a running NVFlare system, through an admin's startup kit: what the runtimes `poc` and `production` share.

Nothing here starts or stops the system itself. NVFlare is imported on first use.
"""

import contextlib
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from fedsft_assets.federation.runtimes.flare.connected_sites import ConnectedSites
from fedsft_assets.federation.runtimes.flare.journal import JournalReader
from fedsft_assets.federation.runtimes.flare.monitor import RUNNING, UNKNOWN, JobMonitor
from fedsft_assets.federation.runtimes.flare.results import JobResults
from fedsft_assets.federation.runtimes.flare.session import FlareSession
from fedsft_assets.federation.runtimes.interface import JobState, RefusedError, ResultLostError, UnavailableError
from fedsft_assets.files import link_or_copy
from fedsft_assets.process_env import child_environment

_POLL_SECONDS = 0.5


class FlareJobs:
    """A `Runtime` over one admin's session. Not thread-safe.

    `close` disconnects and removes the session's folder; without it, an open connection keeps the interpreter alive.
    """

    survives_submitter = True

    def __init__(
        self, session: FlareSession, sites: ConnectedSites | None = None, recovery_seconds: float = 10.0
    ) -> None:
        """`recovery_seconds` is how long a restarted server may take to resume the jobs that it had."""
        self.session = session
        self._sites = sites or ConnectedSites(session)
        self._monitor = JobMonitor(session, recovery_seconds)
        self._results = JobResults(session)
        self._journal = JournalReader(session, self._results)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prepare(self, sites: list[str]) -> None:
        """Connect to the server and wait until all the sites are ready. Raises UnavailableError as `gather` does."""
        for _ in self.gather(sites, len(sites)):
            pass

    def gather(self, sites: list[str], at_least: int) -> Iterator[str]:
        """Connect to the server and wait until enough sites are ready, as `ConnectedSites.wait_for` does."""
        self.session.call(lambda session: session.get_system_info(), self.session.timeouts.connect)
        yield from self._sites.wait_for(sites, at_least)

    def submit(self, job_folder: Path, token: str | None = None) -> str:
        """Without a token, or with a new one, this is a new job; see `FlareSession.submit_job`.

        If the job of the token was deleted since, `poll` reports it as unknown.
        """
        return self.session.submit_job(job_folder, token or uuid.uuid4().hex)

    def poll(self, job_id: str) -> JobState:
        return self._monitor.poll(job_id)

    def new_lines(self, job_id: str) -> list[str]:
        state = self._monitor.last(job_id)
        if state.ended:
            return self._journal.new_lines_of_ended(job_id) if state.status != UNKNOWN else []
        return self._journal.new_lines_of_running(job_id) if state.status == RUNNING else []

    def journal(self, job_id: str) -> list[str] | None:
        return self._journal.all_lines_of_ended(job_id)

    def end_of_log(self, job_id: str, name: str, lines: int) -> str:
        """A site's log is available only if the site streams it to the server."""
        from nvflare.fuel.flare_api.api_spec import InternalError, InvalidTarget, JobNotDone, JobNotFound, JobNotRunning

        def get_logs(session: Any) -> dict[str, Any]:
            try:
                return dict(session.get_job_logs(job_id, target=name, tail_lines=lines))
            except (JobNotFound, JobNotDone, JobNotRunning, InvalidTarget, InternalError):
                return {}

        try:
            answer = self.session.call(get_logs)
        except RefusedError as error:
            return f"({error})"
        return str((answer.get("logs") or {}).get(name) or "")

    def abort(self, job_id: str) -> None:
        """Raises UnavailableError if the job has not ended within `timeouts.abort` seconds."""
        from nvflare.fuel.flare_api.api_spec import JobNotFound, JobNotRunning

        if self.poll(job_id).ended:
            return
        started, timeout = time.monotonic(), self.session.timeouts.abort
        with contextlib.suppress(JobNotFound, JobNotRunning):
            self.session.call(lambda session: _abort(session, job_id), timeout)
        while not (state := self.poll(job_id)).ended:
            waited = time.monotonic() - started
            self._force_stop(job_id, waited)
            if waited > timeout:
                raise UnavailableError(
                    f"job {job_id} is still {state.status} at {self.session.address}, {timeout:.0f} s after it was"
                    " aborted; abort it there (nvflare job abort), or restart the site that hangs"
                )
            time.sleep(_POLL_SECONDS)

    def fetch(self, job_id: str, into: Path) -> None:
        result = self._results.folder_of(job_id)
        if result is None:
            raise ResultLostError(f"the server at {self.session.address} has no result of job {job_id}")
        shutil.copytree(result, into, copy_function=link_or_copy, dirs_exist_ok=True)

    def command(self, module: str) -> tuple[list[str], dict[str, str]]:
        return [sys.executable, "-m", module], child_environment()

    def close(self) -> None:
        self.session.disconnect()
        shutil.rmtree(self.session.folder, ignore_errors=True)

    def _force_stop(self, job_id: str, waited: float) -> None:
        """Stop a job that has not ended `waited` seconds after it was aborted, where this is possible."""


def _abort(session: Any, job_id: str) -> None:
    from nvflare.fuel.flare_api.api_spec import InternalError

    try:
        session.abort_job(job_id)
    except InternalError as error:
        if "is not running" not in str(error):  # the server's answer if the job ended meanwhile
            raise
