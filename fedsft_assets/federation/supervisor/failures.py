"""Explains to the user why a FLARE job failed, from the server's journal and the missing sites' trainers."""

from fedsft_assets.federation.protocol.events import JobError
from fedsft_assets.federation.protocol.journal import Missed
from fedsft_assets.federation.runtimes.interface import JobState, Runtime
from fedsft_assets.federation.site.failure_log import TrainerFailure, first_failure
from fedsft_assets.federation.supervisor.history import History

_TAIL_LINES, _LINES_TO_SEARCH = 40, 5000


def failure_of_job(runtime: Runtime, history: History, job_id: str, state: JobState) -> JobError:
    """The error to show for a job that has ended without a result. Raises UnavailableError."""
    stopped = history.stopped
    if stopped and not stopped.lost_sites:
        return JobError(stopped.reason)
    if not stopped:
        end = runtime.end_of_log(job_id, "server", _TAIL_LINES)
        text = f"FLARE job {job_id} ended early: {state.status}\nThe end of the server's log:\n{end}"
        return JobError(text, retryable=True)
    last = max((one.round for one in history.missed), default=0)
    missed = [one for one in history.missed if one.round == last]
    reasons = [_why(runtime, job_id, one) for one in missed]
    text = "\n".join(reason for reason, _ in reasons)
    return JobError(f"{stopped.reason}\n{text}", retryable=not any(permanent for _, permanent in reasons))


def _why(runtime: Runtime, job_id: str, missed: Missed) -> tuple[str, bool]:
    """Why a site is missing, and whether the reason is its trainer's own traceback."""
    if missed.failure:
        return f"the trainer of {missed.site} failed:\n{missed.failure}", True
    log = runtime.end_of_log(job_id, missed.site, _LINES_TO_SEARCH)
    failure = first_failure(log)
    if not failure:
        return f"{missed.site}: {missed.reason}", False
    return explain(missed.site, failure, log), failure.has_traceback


def explain(site: str, failure: TrainerFailure, log: str) -> str:
    """Format a trainer's failure for the user: its traceback, or else the end of its site's log."""
    end = "\n".join(log.splitlines()[-_TAIL_LINES:])
    rest = "" if failure.has_traceback else f"\nThe end of the site's log:\n{end}"
    return f"the trainer of {site} failed:\n{failure.reason}{rest}"
