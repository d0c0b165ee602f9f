"""The runtime `poc`: jobs in an NVFlare system on this machine that is ours."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from fedsft_assets.federation.protocol.tail import Tail
from fedsft_assets.federation.runtimes.flare.jobs import FlareJobs
from fedsft_assets.federation.runtimes.interface import UnavailableError
from fedsft_assets.federation.runtimes.poc.kits import SERVER
from fedsft_assets.federation.runtimes.poc.system import PocSystem
from fedsft_assets.specs.runtime import Timeouts

_ABORT_SECONDS = 4.0


class Poc(FlareJobs):
    """Jobs in the POC of `system`, which is started when a job needs it and goes on when the job has ended."""

    _seconds_for_late_sites = 120.0
    _seconds_to_go_on = 0.0  # it never does: all that it had ended before it was started
    _hint = "look at `fedsft poc status`, and start it anew: fedsft poc stop; fedsft poc start"

    def __init__(self, system: PocSystem, folder: Path, timeouts: Timeouts | None = None) -> None:
        super().__init__(system.admin_kit, folder, timeouts=timeouts or Timeouts(connect=120, sites=120))
        self._system = system

    def gather(self, sites: list[str], at_least: int) -> Iterator[str]:
        """Sites are started here, so all of them are waited for but those that cannot start."""
        if SERVER in self._system.start(sites):
            self._session.disconnect()
        yield from super().gather(sites, at_least)

    def end_of_log(self, job_id: str, name: str, lines: int) -> str:
        """From the disk; the server's is in the job's result once that is complete."""
        log = self._system.site_folder(name) / job_id / "log.txt"
        return Tail(log).end(lines) if log.is_file() else super().end_of_log(job_id, name, lines)

    def abort(self, job_id: str) -> None:
        """What NVFlare has not ended after a few seconds is ended by force."""
        try:
            super().abort(job_id)
        except UnavailableError:
            if not self._permanent_failure():
                raise
        finally:
            self._system.end_job(job_id)

    def _force_stop(self, job_id: str, waited: float) -> None:
        if waited > _ABORT_SECONDS:
            self._system.end_job(job_id)

    def _permanent_failure(self) -> str:
        if self._system.started(SERVER) < float("inf"):
            return ""
        what = f"the server of the POC in {self._system.folder} does not run; {self._hint}"
        return f"{what}\n{self._system.end_of_console('server')}"

    def _listed(self) -> dict[str, float]:
        """Without sites that the server still has by a process that is gone."""
        return {site: heard for site, heard in super()._listed().items() if heard >= self._system.started(site)}

    def _ended(self, missing: list[str]) -> list[str]:
        return [site for site in missing if self._system.started(site) == float("inf")]

    def _missing_sites(self, missing: Mapping[str, str]) -> str:
        return "\n".join([super()._missing_sites(missing), *map(self._system.end_of_console, missing)])
