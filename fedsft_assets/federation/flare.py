"""Jobs in a running NVFlare system, through an admin's startup kit: what `poc` and `production` have in common.

Nothing here starts or stops the system itself. NVFlare is imported on first use.
"""

import contextlib
import importlib.metadata
import os
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from fedsft_assets.federation.exchange import JOURNAL_COMMAND
from fedsft_assets.federation.flare_session import FlareSession, Timeouts
from fedsft_assets.federation.journal import JOURNAL_FILE
from fedsft_assets.federation.runtime import JobState, ResultLostError, UnavailableError
from fedsft_assets.federation.tail import Tail

COMPLETED = "FINISHED:COMPLETED"
_ENDED = "FINISHED"
_RUNNING = "RUNNING"
_UNKNOWN = "UNKNOWN"
_POLL_SECONDS = 0.5
_SITE_SECONDS = 10.0
_SILENT = "No replies"  # what NVFlare's server says for a site that did not answer it
_JOURNAL_SECONDS = 3.0
_LOST_SECONDS = 10.0


class FlareJobs:
    """A `Runtime` over one admin's connection; it is opened on first use, and again when it was lost.

    `startup_kit`, `study` and `timeouts` are as FlareSession has them; `folder` is this object's own, for what it
    downloads, and is gone after `close`. Without `close`, the connection keeps the interpreter from ending. Not for
    several threads at once.
    """

    outlives = True

    def __init__(self, startup_kit: Path, folder: Path, study: str = "default", timeouts: Timeouts | None = None):
        self.timeouts = timeouts or Timeouts()
        self._folder = folder
        self._session = FlareSession(startup_kit, folder, study, self.timeouts, self._hopeless, self._what_to_do)
        self._states: dict[str, JobState] = {}
        self._offsets: dict[str, int] = {}
        self._missing_since: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prepare(self, sites: list[str]) -> None:
        """Reach the server and wait until the sites answer, all with the NVFlare version of this process.

        Raises UnavailableError that names the address, or the sites.
        """
        self._session.ask(lambda session: session.get_system_info(), self.timeouts.connect)
        waited_until = time.monotonic() + self.timeouts.sites
        while missing := sorted(set(sites) - (answering := self._answering(sites)).keys()):
            late = missing if time.monotonic() > waited_until else self._ended(missing)
            if late:
                raise UnavailableError(self._missing_sites(late))
            time.sleep(_POLL_SECONDS)
        server = self._session.ask(lambda session: session.report_version("server"))["server"]["version"]
        _check_versions({"server": server, **answering})

    def submit(self, job_folder: Path, token: str | None = None) -> str:
        """A token stands for one job, whichever way it was handed in first; without a token, it is a new job.

        The server keeps tokens on its disk, apart for each study and user, over its own restarts and the end of
        their jobs. Of a job that was removed since, `poll` says that it is unknown.
        """
        from nvflare.fuel.flare_api.api_spec import SubmitTokenConflict, SubmitTokenJobDeleted

        token = token or uuid.uuid4().hex
        try:
            with _temporary_files_in(self._folder):
                job_id = self._session.ask(lambda session: session.submit_job(str(job_folder), submit_token=token))
        except SubmitTokenJobDeleted as error:
            job_id = error.job_id
        except SubmitTokenConflict as error:  # other bytes, as another version of this package may write them
            job_id = error.existing_job_id
        return str(job_id)

    def poll(self, job_id: str) -> JobState:
        from nvflare.fuel.flare_api.api_spec import JobNotFound

        try:
            meta = self._session.ask(lambda session: session.get_job_meta(job_id))
        except JobNotFound:
            state = JobState(ended=True, succeeded=False, said=_UNKNOWN)
        else:
            status = str(meta.get("status"))
            ended, succeeded = status.startswith(_ENDED), status == COMPLETED
            why = _why_not_run(meta) if ended and not succeeded else ""
            state = JobState(ended, succeeded, f"{status} ({why})" if why else status)
            if status == _RUNNING and self._is_lost(job_id, str(meta.get("start_time"))):
                state = JobState(ended=True, succeeded=False, said="LOST (the server was started anew while it ran)")
        self._states[job_id] = state
        return state

    def new_lines(self, job_id: str) -> list[str]:
        """From the job's server while it runs, from its result when it has ended."""
        state = self._states.get(job_id) or self.poll(job_id)
        if state.ended:
            return self._lines_of_result(job_id) if state.said != _UNKNOWN else []
        return self._lines_of_running_job(job_id) if state.said == _RUNNING else []

    def end_of_log(self, job_id: str, name: str, lines: int) -> str:
        """A site's log is there only if the site lets the server have it."""
        from nvflare.fuel.flare_api.api_spec import JobNotFound

        try:
            answer = self._session.ask(lambda session: session.get_job_logs(job_id, target=name, tail_lines=lines))
        except JobNotFound:
            return ""
        return str((answer.get("logs") or {}).get(name) or "")

    def abort(self, job_id: str) -> None:
        """Raises UnavailableError if the job has not ended within the time for that."""
        from nvflare.fuel.flare_api.api_spec import JobNotFound, JobNotRunning

        if self.poll(job_id).ended:
            return
        begun = time.monotonic()
        with contextlib.suppress(JobNotFound, JobNotRunning):
            self._session.ask(lambda session: _abort(session, job_id), self.timeouts.abort)
        while not (state := self.poll(job_id)).ended:
            waited = time.monotonic() - begun
            self._hasten(job_id, waited)
            if waited > self.timeouts.abort:
                raise UnavailableError(
                    f"job {job_id} is still {state.said} at {self._session.address}, {self.timeouts.abort:.0f} s after"
                    " it was told to stop; abort it there: nvflare job abort, or restart the site that hangs"
                )
            time.sleep(_POLL_SECONDS)

    def fetch(self, job_id: str, into: Path) -> None:
        result = self._result(job_id)
        if result is None:
            raise ResultLostError(f"the server at {self._session.address} has no result of job {job_id}")
        shutil.copytree(result, into, copy_function=_link_or_copy, dirs_exist_ok=True)

    def command(self, module: str) -> tuple[list[str], dict[str, str]]:
        return [sys.executable, "-m", module], dict(os.environ)

    def close(self) -> None:
        self._session.drop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _is_lost(self, job_id: str, start_time: str) -> bool:
        """Whether the job began before its server did, which does not have it: NVFlare has such jobs run for ever.

        A server that is started may go on with its jobs, which takes it a moment.
        """
        if datetime.fromisoformat(start_time).timestamp() >= self._session.server_began:
            return False
        system = self._session.ask(lambda session: session.get_system_info())
        if job_id in {job.job_id for job in system.job_info}:
            self._missing_since.pop(job_id, None)
            return False
        return time.monotonic() - self._missing_since.setdefault(job_id, time.monotonic()) > _LOST_SECONDS

    def _hasten(self, job_id: str, waited: float) -> None:
        """What can be done for a job that has not ended so many seconds after it was told to."""

    def _connected(self) -> set[str]:
        """The sites that the server can reach now."""
        return {client.name for client in self._session.ask(lambda session: session.get_connected_client_list())}

    def _ended(self, missing: list[str]) -> list[str]:  # noqa: ARG002
        """Those sites for which there is no use in waiting."""
        return []

    def _missing_sites(self, missing: list[str]) -> str:
        connected = ", ".join(sorted(self._connected())) or "none"
        return (
            f"{_sites(missing)} not connected to the server at {self._session.address} (it lists: {connected});"
            " start the site, or take it out of the job file"
        )

    def _answering(self, sites: Iterable[str]) -> dict[str, str]:
        """Those of the sites that answer now, with their versions of NVFlare; empty for one that does not tell.

        A server goes on to list a site for minutes after it is gone.
        """
        from nvflare.fuel.flare_api.api_spec import InvalidTarget, NoConnection

        def ask(session: Any) -> dict[str, str]:
            versions = {}
            session.set_timeout(_SITE_SECONDS)
            try:
                for site in sorted(connected):
                    with contextlib.suppress(InvalidTarget, NoConnection):
                        said = session.report_version("client", [site]).get(site, {"error": _SILENT})
                        if said.get("error") != _SILENT:
                            versions[site] = str(said.get("version") or "")
            finally:
                session.set_timeout(self.timeouts.command)
            return versions

        connected = self._connected() & set(sites)
        return self._session.ask(ask)

    def _lines_of_running_job(self, job_id: str) -> list[str]:
        lines: list[str] = []
        while text := self._more_of_journal(job_id):
            lines += text.splitlines()
        return lines

    def _more_of_journal(self, job_id: str) -> str:
        """Empty also while the job's server cannot answer: it starts, it ends, or it is busy. Others find that out."""
        question = {"offset": self._offsets.get(job_id, 0)}
        answer = self._session.ask_once(
            lambda session: session.do_app_command(job_id, JOURNAL_COMMAND, question), _JOURNAL_SECONDS
        )
        if not answer or not answer.get("text"):
            return ""
        self._offsets[job_id] = int(answer["offset"])
        return str(answer["text"])

    def _lines_of_result(self, job_id: str) -> list[str]:
        result = self._result(job_id)
        if result is None:
            return []
        journal = Tail(result / JOURNAL_FILE, self._offsets.get(job_id, 0))
        lines = journal.new_lines()
        self._offsets[job_id] = journal.offset
        return lines

    def _result(self, job_id: str) -> Path | None:
        """The folder with the files of the job's server part, downloaded once; None if there is none."""
        from nvflare.fuel.flare_api.api_spec import JobNotFound

        target = self._folder / "results" / job_id
        if not target.is_dir():
            try:
                location = self._session.ask(lambda session: session.download_job_result(job_id))
            except JobNotFound:
                return None
            if not location or not Path(location).is_dir():
                return None
            target.parent.mkdir(parents=True, exist_ok=True)
            Path(location).rename(target)
        workspace = target / "workspace"
        return workspace if workspace.is_dir() else None

    def _hopeless(self) -> str:
        """Why there is no use in asking the server; empty if there is."""
        return ""

    _what_to_do = "check that it runs and that this machine reaches it"


@contextlib.contextmanager
def _temporary_files_in(folder: Path) -> Iterator[None]:
    """NVFlare leaves what it sent behind when the server takes no new job for it, or does not answer."""
    folder.mkdir(parents=True, exist_ok=True)
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def _why_not_run(meta: dict[str, Any]) -> str:
    """What the server wrote down about a job that it could not schedule or deploy."""
    status = str(meta.get("status"))
    if status == "FINISHED:CAN_NOT_SCHEDULE":
        return str((meta.get("schedule_history") or [""])[-1])
    if status == "FINISHED:FAILED_TO_RUN":
        return "; ".join(str(said) for said in meta.get("job_deploy_detail") or [] if not str(said).endswith(": OK"))
    return ""


def _abort(session: Any, job_id: str) -> None:
    from nvflare.fuel.flare_api.api_spec import InternalError

    try:
        session.abort_job(job_id)
    except InternalError as error:
        if "is not running" not in str(error):  # what a server says of a job that ended with the last server
            raise


def _check_versions(versions: dict[str, str]) -> None:
    own = importlib.metadata.version("nvflare")
    other = [f"{name} has {found}" for name, found in sorted(versions.items()) if found and not _agree(found, own)]
    if other:
        raise UnavailableError(f"NVFlare here is {own}, but {', '.join(other)}; install the same version everywhere")


def _agree(version: str, other: str) -> bool:
    return version.split(".")[:2] == other.split(".")[:2]


def _sites(names: list[str]) -> str:
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"


def _link_or_copy(source: str, target: str) -> str:
    """Results are big and never changed in place, so the same file can have two names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target
