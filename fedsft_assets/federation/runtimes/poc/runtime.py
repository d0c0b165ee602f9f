"""The runtime `poc`: jobs in our own NVFlare system on this machine."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from fedsft_assets.federation.protocol.tail import Tail
from fedsft_assets.federation.runtimes.flare.connected_sites import ConnectedSites
from fedsft_assets.federation.runtimes.flare.jobs import FlareJobs
from fedsft_assets.federation.runtimes.flare.session import FlareSession
from fedsft_assets.federation.runtimes.interface import UnavailableError
from fedsft_assets.federation.runtimes.poc.kits import SERVER
from fedsft_assets.federation.runtimes.poc.system import PocSystem
from fedsft_assets.specs.runtime import Timeouts

_SECONDS_BEFORE_KILL = 4.0  # after a job is aborted
_LATE_SITE_SECONDS = 120.0
_HINT = "see `fedsft poc status`, and restart it: fedsft poc stop; fedsft poc start"


def start(system: PocSystem) -> None:
    """Start the processes of a POC that are not running, and wait for all its sites. Raises UnavailableError."""
    with Poc(system, system.folder / "commands") as poc:
        poc.prepare(sorted(system.sites))


class Poc(FlareJobs):
    """Jobs in the POC of `system`, which is started when a job needs it and keeps running afterwards."""

    def __init__(self, system: PocSystem, folder: Path, timeouts: Timeouts | None = None) -> None:
        """`folder` takes downloads and temporary files."""
        self._system = system
        session = FlareSession(
            system.admin_kit,
            folder,
            timeouts=timeouts or Timeouts(connect=120, sites=120),
            permanent_failure=self._server_failure,
            hint=_HINT,
        )
        # A restarted POC resumes no job.
        super().__init__(session, _PocSites(session, system), recovery_seconds=0.0)

    def gather(self, sites: list[str], at_least: int) -> Iterator[str]:
        """Start what is not running, and wait for all the sites except those whose processes ended."""
        if SERVER in self._system.start(sites):
            self.session.disconnect()
        yield from super().gather(sites, at_least)

    def end_of_log(self, job_id: str, name: str, lines: int) -> str:
        """Read from disk while the job runs; the complete server log is in the job's result."""
        log = self._system.site_folder(name) / job_id / "log.txt"
        return Tail(log).end(lines) if log.is_file() else super().end_of_log(job_id, name, lines)

    def abort(self, job_id: str) -> None:
        """Processes of the job that NVFlare has not ended after a few seconds are killed."""
        try:
            super().abort(job_id)
        except UnavailableError:
            if not self._server_failure():
                raise
        finally:
            self._system.kill_job(job_id)

    def _force_stop(self, job_id: str, waited: float) -> None:
        if waited > _SECONDS_BEFORE_KILL:
            self._system.kill_job(job_id)

    def _server_failure(self) -> str:
        if self._system.started_at(SERVER) is not None:
            return ""
        failure = f"the server of the POC in {self._system.folder} is not running; {_HINT}"
        return f"{failure}\n{self._system.end_of_console('server')}"


class _PocSites(ConnectedSites):
    """Sites whose processes are known, so that ended or restarted ones are noticed without the server."""

    def __init__(self, session: FlareSession, system: PocSystem) -> None:
        super().__init__(session, _LATE_SITE_SECONDS)
        self._system = system

    def heartbeats(self) -> dict[str, float]:
        """Heartbeats, except those of ended processes."""
        started = self._system.started_at
        return {
            site: heartbeat
            for site, heartbeat in super().heartbeats().items()
            if (since := started(site)) is not None and heartbeat >= since
        }

    def exited(self, missing: list[str]) -> list[str]:
        return [site for site in missing if self._system.started_at(site) is None]

    def explain(self, missing: Mapping[str, str]) -> str:
        return "\n".join([super().explain(missing), *map(self._system.end_of_console, missing)])
