"""The state of FLARE jobs by the metadata that a server keeps; jobs in a real one are in test_jobs."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from nvflare.fuel.flare_api.api_spec import JobNotFound

from fedsft_assets.federation.runtimes.flare.monitor import JobMonitor
from fedsft_assets.federation.runtimes.flare.session import FlareSession
from fedsft_assets.federation.runtimes.interface import JobState
from fedsft_assets_tests.federation.clock import Clock

_BEFORE, _SERVER_STARTED, _AFTER = "2026-01-01T00:00:00+00:00", 1767225660.0, "2026-01-01T00:02:00+00:00"
_PERMISSION = "site-1: job not permitted by site-1"


class Server:
    """A session with a server that has one job."""

    server_started = _SERVER_STARTED

    def __init__(self, **meta: object) -> None:
        self._meta = meta
        self.processes: list[str] = []

    def monitor(self, recovery_seconds: float = 10.0) -> JobMonitor:
        return JobMonitor(cast(FlareSession, self), recovery_seconds)

    def call(self, call: Callable[[Any], Any]) -> Any:
        return call(self)

    def get_job_meta(self, _job_id: str) -> dict[str, object]:
        if not self._meta:
            raise JobNotFound
        return self._meta

    def get_system_info(self) -> SimpleNamespace:
        return SimpleNamespace(job_info=[SimpleNamespace(job_id=job_id) for job_id in self.processes])


@pytest.mark.parametrize(
    ("meta", "state"),
    [
        ({"status": "RUNNING", "start_time": _AFTER}, JobState(False, False, "RUNNING")),
        ({"status": "FINISHED:COMPLETED"}, JobState(True, True, "FINISHED:COMPLETED")),
        ({"status": "FINISHED:ABORTED"}, JobState(True, False, "FINISHED:ABORTED")),
        ({}, JobState(True, False, "UNKNOWN")),
        ({"status": "SUBMITTED"}, JobState(False, False, "SUBMITTED", waiting=True)),
        (
            {"status": "SUBMITTED", "schedule_history": ["an earlier try", "no GPU is free"]},
            JobState(False, False, "SUBMITTED (no GPU is free)", waiting=True),
        ),
        (
            {"status": "FINISHED:FAILED_TO_RUN", "job_deploy_detail": ["server: OK", _PERMISSION]},
            JobState(True, False, f"FINISHED:FAILED_TO_RUN ({_PERMISSION})", forbidden=True),
        ),
    ],
)
def test_state_has_the_servers_status_and_its_reason_for_a_job_that_did_not_run(
    meta: dict[str, object], state: JobState
) -> None:
    monitor = Server(**meta).monitor()
    assert monitor.poll("job") == state
    assert monitor.last("job") == state


def test_job_of_an_earlier_server_process_is_lost_unless_it_is_resumed_in_time(clock: Clock) -> None:
    server = Server(status="RUNNING", start_time=_BEFORE)
    monitor = server.monitor(recovery_seconds=10.0)
    assert monitor.poll("job").status == "RUNNING"
    clock.now += 9.0
    server.processes = ["job"]
    assert monitor.poll("job").status == "RUNNING"
    server.processes = []
    clock.now += 9.0
    assert monitor.poll("job").status == "RUNNING"
    clock.now += 10.0
    assert monitor.poll("job") == JobState(True, False, "LOST (the server was restarted while the job ran)")
