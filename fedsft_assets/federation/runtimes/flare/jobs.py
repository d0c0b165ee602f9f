"""Jobs in a running NVFlare system, through an admin's startup kit: what `poc` and `production` have in common.

Nothing here starts or stops the system itself. NVFlare is imported on first use.
"""

import contextlib
import importlib.metadata
import re
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from fedsft_assets.federation.protocol.journal import JOURNAL_FILE
from fedsft_assets.federation.protocol.messages import JOURNAL_COMMAND
from fedsft_assets.federation.protocol.tail import Tail
from fedsft_assets.federation.runtimes.flare.session import FlareSession
from fedsft_assets.federation.runtimes.interface import JobState, RefusedError, ResultLostError, UnavailableError
from fedsft_assets.federation.runtimes.plain_path import plain_path
from fedsft_assets.files import link_or_copy
from fedsft_assets.process_env import child_environment
from fedsft_assets.specs.runtime import Timeouts

COMPLETED = "FINISHED:COMPLETED"
_ENDED = "FINISHED"
_RUNNING = "RUNNING"
_DISPATCHED = "DISPATCHED"
_WAITING = ("SUBMITTED", "APPROVED", _DISPATCHED)
_FORBIDS = re.compile(r"not (permitted|authorized)")  # what a policy says of a job, by NVFlare's authorization
_UNKNOWN = "UNKNOWN"
_POLL_SECONDS = 0.5
_SITE_SECONDS = 10.0
_SECONDS_TO_APPEAR = 2.0  # of a site that is missing, before it is told
_HEARTBEAT_LATE = 30.0  # seconds; a site says every 10 that it is there
_NOT_CONNECTED = "not connected"
_NO_ANSWER = "does not answer, though the server still lists it: it is gone, or its link is cut"
_LOCKED_OUT = (
    "is locked out: another process has registered with its startup kit, and the server listens to that one alone;"
    " find where the kit was copied to and end that process: the site is let in again within ten minutes, or at once"
    " when it is started again"
)
_SILENT = "No replies"  # what NVFlare's server says for a site that did not answer it
_JOURNAL_SECONDS = 3.0


class FlareJobs:
    """A `Runtime` over one admin's connection; it is opened on first use, and again when it was lost.

    `startup_kit`, `study` and `timeouts` are as FlareSession has them; `folder` is this object's own, for what it
    downloads, and is gone after `close`. Without `close`, the connection keeps the interpreter from ending. Not for
    several threads at once.
    """

    survives_submitter = True
    _seconds_for_late_sites = 5.0  # once enough sites are there; whoever comes later is taken in by then
    _seconds_to_go_on = 10.0
    """A server that is started anew may take so long until it goes on with the jobs that it had."""

    def __init__(self, startup_kit: Path, folder: Path, study: str = "default", timeouts: Timeouts | None = None):
        self.timeouts = timeouts or Timeouts()
        self._folder = folder
        self._session = FlareSession(startup_kit, folder, study, self.timeouts, self._permanent_failure, self._hint)
        self._states: dict[str, JobState] = {}
        self._offsets: dict[str, int] = {}
        self._missing_since: dict[str, float] = {}
        self._heartbeats: dict[str, float] = {}  # the last of each site, by the server's clock
        self._beats: dict[str, float] = {}  # and when it was seen to come, by this process's

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prepare(self, sites: list[str]) -> None:
        """Reach the server and wait until all the sites can get tasks. Raises UnavailableError as `gather` does."""
        for _ in self.gather(sites, len(sites)):
            pass

    def gather(self, sites: list[str], at_least: int) -> Iterator[str]:
        """Reach the server and wait until so many sites can get tasks, all with the NVFlare version of this process.

        Raises UnavailableError that names the address, or the sites and what is the matter with each.
        """
        self._session.call(lambda session: session.get_system_info(), self.timeouts.connect)
        begun, told = time.monotonic(), dict[str, str]()
        while True:
            answering, missing = self._look_at(sites)
            ended = self._ended(sorted(missing))
            waited = time.monotonic() - begun
            if len(answering) >= at_least and (
                len(missing) == len(ended) or waited > min(self._seconds_for_late_sites, self.timeouts.sites)
            ):
                break
            if len(sites) - len(ended) < at_least or waited > self.timeouts.sites:
                late = missing if waited > self.timeouts.sites else {site: missing[site] for site in ended}
                raise UnavailableError(self._missing_sites(late))
            for site, why in missing.items():
                if told.get(site) != why and waited > _SECONDS_TO_APPEAR:
                    yield f"waiting for {site}: {why}"
                    told[site] = why
            time.sleep(_POLL_SECONDS)
        for site, why in missing.items():
            yield f"without {site} for now, which takes part once it is there: {why}"
        server = self._session.call(lambda session: session.report_version("server"))["server"]["version"]
        _check_versions({"server": server, **answering})

    def submit(self, job_folder: Path, token: str | None = None) -> str:
        """A token stands for one job, whichever way it was handed in first; without a token, it is a new job.

        The server keeps tokens on its disk, apart for each study and user, over its own restarts and the end of
        their jobs. Of a job that was removed since, `poll` says that it is unknown.
        """
        from nvflare.fuel.flare_api.api_spec import SubmitTokenConflict, SubmitTokenJobDeleted

        token = token or uuid.uuid4().hex
        try:
            # The folder's path becomes a word of a command, and its name that of the job.
            with plain_path(job_folder.parent) as place, temporary_files_in(self._folder):
                folder = str(place / job_folder.name)
                job_id = self._session.call(lambda session: session.submit_job(folder, submit_token=token))
        except SubmitTokenJobDeleted as error:
            job_id = error.job_id
        except SubmitTokenConflict as error:  # other bytes, as another version of this package may write them
            job_id = error.existing_job_id
        return str(job_id)

    def poll(self, job_id: str) -> JobState:
        from nvflare.fuel.flare_api.api_spec import JobNotFound

        try:
            meta = self._session.call(lambda session: session.get_job_meta(job_id))
        except JobNotFound:
            state = JobState(ended=True, succeeded=False, status=_UNKNOWN)
        else:
            status = str(meta.get("status"))
            ended, succeeded = status.startswith(_ENDED), status == COMPLETED
            why = "" if succeeded else _why_not_run(meta)
            said = f"{status} ({why})" if why else status
            state = JobState(ended, succeeded, said, status in _WAITING, forbidden=ended and bool(_FORBIDS.search(why)))
            if status in (_RUNNING, _DISPATCHED) and self._is_lost(job_id, _begun(meta)):
                state = JobState(ended=True, succeeded=False, status="LOST (the server was started anew while it ran)")
        self._states[job_id] = state
        return state

    def new_lines(self, job_id: str) -> list[str]:
        """From the job's server while it runs, from its result when it has ended."""
        state = self._states.get(job_id) or self.poll(job_id)
        if state.ended:
            return self._lines_of_result(job_id) if state.status != _UNKNOWN else []
        return self._lines_of_running_job(job_id) if state.status == _RUNNING else []

    def journal(self, job_id: str) -> list[str] | None:
        result = self._result(job_id)
        return Tail(result / JOURNAL_FILE).new_lines() or None if result else None

    def end_of_log(self, job_id: str, name: str, lines: int) -> str:
        """A site's log is there only if the site lets the server have it."""
        from nvflare.fuel.flare_api.api_spec import InternalError, InvalidTarget, JobNotDone, JobNotFound, JobNotRunning

        def ask(session: Any) -> dict[str, Any]:
            try:
                return dict(session.get_job_logs(job_id, target=name, tail_lines=lines))
            except (JobNotFound, JobNotDone, JobNotRunning, InvalidTarget, InternalError):
                return {}

        try:
            answer = self._session.call(ask)
        except RefusedError as error:
            return f"({error})"
        return str((answer.get("logs") or {}).get(name) or "")

    def abort(self, job_id: str) -> None:
        """Raises UnavailableError if the job has not ended within the time for that."""
        from nvflare.fuel.flare_api.api_spec import JobNotFound, JobNotRunning

        if self.poll(job_id).ended:
            return
        begun = time.monotonic()
        with contextlib.suppress(JobNotFound, JobNotRunning):
            self._session.call(lambda session: _abort(session, job_id), self.timeouts.abort)
        while not (state := self.poll(job_id)).ended:
            waited = time.monotonic() - begun
            self._force_stop(job_id, waited)
            if waited > self.timeouts.abort:
                raise UnavailableError(
                    f"job {job_id} is still {state.status} at {self._session.address}, {self.timeouts.abort:.0f} s"
                    " after it was told to stop; abort it there: nvflare job abort, or restart the site that hangs"
                )
            time.sleep(_POLL_SECONDS)

    def fetch(self, job_id: str, into: Path) -> None:
        result = self._result(job_id)
        if result is None:
            raise ResultLostError(f"the server at {self._session.address} has no result of job {job_id}")
        shutil.copytree(result, into, copy_function=link_or_copy, dirs_exist_ok=True)

    def command(self, module: str) -> tuple[list[str], dict[str, str]]:
        return [sys.executable, "-m", module], child_environment()

    def close(self) -> None:
        self._session.disconnect()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _is_lost(self, job_id: str, begun: float) -> bool:
        """Whether the job began before its server did, which does not have it: NVFlare has such jobs run for ever."""
        if begun >= self._session.server_began:
            return False
        system = self._session.call(lambda session: session.get_system_info())
        if job_id in {job.job_id for job in system.job_info}:
            self._missing_since.pop(job_id, None)
            return False
        return time.monotonic() - self._missing_since.setdefault(job_id, time.monotonic()) >= self._seconds_to_go_on

    def _force_stop(self, job_id: str, waited: float) -> None:
        """What can be done for a job that has not ended so many seconds after it was told to."""

    def _listed(self) -> dict[str, float]:
        """The sites that the server lists, and when it has heard of each the last time, by the server's clock."""
        clients = self._session.call(lambda session: session.get_connected_client_list())
        return {client.name: float(client.last_connect_time) for client in clients}

    def _ended(self, missing: list[str]) -> list[str]:  # noqa: ARG002
        """Those sites for which there is no use in waiting."""
        return []

    def _missing_sites(self, missing: Mapping[str, str]) -> str:
        """What to tell of sites that are missing, with what is the matter with each."""
        unknown = [site for site, why in missing.items() if why == _NOT_CONNECTED]
        others = [f"{site} {why}" for site, why in missing.items() if why != _NOT_CONNECTED]
        listed = ", ".join(sorted(self._listed())) or "none"
        address = self._session.address
        told = []
        if unknown:
            told.append(f"{_sites(unknown)} {_NOT_CONNECTED} to the server at {address} (it lists: {listed})")
        if others:
            told.append(f"of the server at {address}: {'; '.join(others)}")
        return f"{'; '.join(told)}; start the site, or take it out of the job file"

    def _look_at(self, sites: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
        """Sites that can get tasks, with their versions of NVFlare; and the others, with what is the matter with each.

        A server goes on to list a site for minutes after it is gone, so the sites are asked. One that answers cannot
        get tasks if the server has not heard its heartbeat: then another process has registered with its startup kit,
        and the server takes the site's own messages for those of a stranger.
        """
        listed = self._listed()
        versions = self._versions(sorted(listed.keys() & set(sites)))
        answering: dict[str, str] = {}
        missing: dict[str, str] = {}
        newest = max(time.time(), *listed.values()) if listed else 0.0
        for site in sorted(sites):
            if site not in listed:
                missing[site] = _NOT_CONNECTED
                continue
            self._note_heartbeat(site, listed[site])
            silent = newest - listed[site]
            heard = silent < _HEARTBEAT_LATE or time.monotonic() - self._beats[site] < _HEARTBEAT_LATE
            if site in versions and heard:
                answering[site] = versions[site]
            elif site in versions:
                missing[site] = _LOCKED_OUT
            else:
                missing[site] = _NO_ANSWER
        return answering, missing

    def _note_heartbeat(self, site: str, heard: float) -> None:
        """So that it is seen to come whatever the server's clock says."""
        before = self._heartbeats.get(site, heard)
        self._heartbeats[site] = heard
        if heard > before:
            self._beats[site] = time.monotonic()
        self._beats.setdefault(site, float("-inf"))

    def _versions(self, sites: list[str]) -> dict[str, str]:
        """Of the sites that answer; empty for one that does not tell."""
        from nvflare.fuel.flare_api.api_spec import InvalidTarget, NoConnection

        def ask(session: Any) -> dict[str, dict[str, str]]:
            session.set_timeout(_SITE_SECONDS)
            try:
                return dict(session.report_version("client", sites))
            except (InvalidTarget, NoConnection):  # one of them has just left
                return {}
            finally:
                session.set_timeout(self.timeouts.command)

        said = self._session.call(ask) if sites else {}
        return {site: str(one.get("version") or "") for site, one in said.items() if one.get("error", "") != _SILENT}

    def _lines_of_running_job(self, job_id: str) -> list[str]:
        lines: list[str] = []
        while text := self._more_of_journal(job_id):
            lines += text.splitlines()
        return lines

    def _more_of_journal(self, job_id: str) -> str:
        """Empty also while the job's server cannot answer: it starts, it ends, or it is busy. Others find that out."""
        question = {"offset": self._offsets.get(job_id, 0)}
        answer = self._session.try_call(
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
        """The folder with the files of the job's server part, downloaded once; None if there is none.

        A server hands out the result of a job of any outcome, but none of one that ended with the server before it.
        """
        from nvflare.fuel.flare_api.api_spec import JobNotDone, JobNotFound

        target = self._folder / "results" / job_id
        if not target.is_dir():
            try:
                location = self._session.call(lambda session: session.download_job_result(job_id))
            except (JobNotFound, JobNotDone):
                return None
            if not location or not Path(location).is_dir():
                return None
            target.parent.mkdir(parents=True, exist_ok=True)
            Path(location).rename(target)
        workspace = target / "workspace"
        return workspace if workspace.is_dir() else None

    def _permanent_failure(self) -> str:
        """Why there is no use in asking the server; empty if there is."""
        return ""

    _hint = "check that it runs and that this machine reaches it"


@contextlib.contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """NVFlare leaves what it sent behind when the server takes no new job for it, or does not answer."""
    folder.mkdir(parents=True, exist_ok=True)
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def _why_not_run(meta: dict[str, Any]) -> str:
    """What the server wrote down about a job that it could not schedule or deploy, up to now."""
    status = str(meta.get("status"))
    if status in ("FINISHED:CAN_NOT_SCHEDULE", "SUBMITTED"):
        return str((meta.get("schedule_history") or [""])[-1])
    if status == "FINISHED:FAILED_TO_RUN":
        return "; ".join(str(said) for said in meta.get("job_deploy_detail") or [] if not str(said).endswith(": OK"))
    return ""


def _begun(meta: dict[str, Any]) -> float:
    """When the server started a job, or took it if it has not started it yet, in seconds since the epoch."""
    return datetime.fromisoformat(str(meta.get("start_time") or meta.get("submit_time_iso"))).timestamp()


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
