"""The state of FLARE jobs, from the server's job metadata."""

import re
import time
from datetime import datetime
from typing import Any

from fedsft_assets.federation.runtimes.flare.session import FlareSession
from fedsft_assets.federation.runtimes.interface import JobState

RUNNING = "RUNNING"
UNKNOWN = "UNKNOWN"
_ENDED = "FINISHED"
_COMPLETED = "FINISHED:COMPLETED"
_DISPATCHED = "DISPATCHED"
_WAITING = ("SUBMITTED", "APPROVED", _DISPATCHED)
_NOT_AUTHORIZED = re.compile(r"not (permitted|authorized)")  # NVFlare's wording for a job that a policy forbids
_LOST = JobState(ended=True, succeeded=False, status="LOST (the server was restarted while the job ran)")


class JobMonitor:
    """Polls jobs, and notices those that ended with an earlier process of the server."""

    def __init__(self, session: FlareSession, recovery_seconds: float) -> None:
        """`recovery_seconds` is how long a restarted server may take to resume the jobs that it had."""
        self._session, self._recovery_seconds = session, recovery_seconds
        self._states: dict[str, JobState] = {}
        self._missing_since: dict[str, float] = {}

    def poll(self, job_id: str) -> JobState:
        """The job's state now; UNKNOWN, and ended, for a job that the server does not have."""
        from nvflare.fuel.flare_api.api_spec import JobNotFound

        try:
            meta = self._session.call(lambda session: session.get_job_meta(job_id))
        except JobNotFound:
            state = JobState(ended=True, succeeded=False, status=UNKNOWN)
        else:
            state = _state(meta)
            if meta.get("status") in (RUNNING, _DISPATCHED) and self._is_lost(job_id, _started(meta)):
                state = _LOST
        self._states[job_id] = state
        return state

    def last(self, job_id: str) -> JobState:
        """The state at the last poll."""
        return self._states.get(job_id) or self.poll(job_id)

    def _is_lost(self, job_id: str, started: float) -> bool:
        """Whether the job started before its server did, and the server has no process for it.

        NVFlare reports such jobs as running for ever.
        """
        if started >= self._session.server_started:
            return False
        system = self._session.call(lambda session: session.get_system_info())
        if job_id in {job.job_id for job in system.job_info}:
            self._missing_since.pop(job_id, None)
            return False
        return time.monotonic() - self._missing_since.setdefault(job_id, time.monotonic()) >= self._recovery_seconds


def _state(meta: dict[str, Any]) -> JobState:
    status = str(meta.get("status"))
    ended, succeeded = status.startswith(_ENDED), status == _COMPLETED
    reason = _reason_not_run(status, meta)
    return JobState(
        ended,
        succeeded,
        status=f"{status} ({reason})" if reason else status,
        waiting=status in _WAITING,
        forbidden=ended and bool(_NOT_AUTHORIZED.search(reason)),
    )


def _reason_not_run(status: str, meta: dict[str, Any]) -> str:
    """The server's reason why it could not schedule or deploy a job, so far; empty if it could."""
    if status in ("FINISHED:CAN_NOT_SCHEDULE", "SUBMITTED"):
        return str((meta.get("schedule_history") or [""])[-1])
    if status == "FINISHED:FAILED_TO_RUN":
        return "; ".join(str(line) for line in meta.get("job_deploy_detail") or [] if not str(line).endswith(": OK"))
    return ""


def _started(meta: dict[str, Any]) -> float:
    """When the job started, or was submitted if it has not started yet, in seconds since the epoch."""
    return datetime.fromisoformat(str(meta.get("start_time") or meta.get("submit_time_iso"))).timestamp()
