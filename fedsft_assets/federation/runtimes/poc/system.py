"""The lifecycle of a POC: an NVFlare system of processes on this machine, which we start, repair and stop.

It writes into one folder only and listens on loopback only; several POCs on one machine are independent.
"""

import contextlib
import importlib.metadata
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil

from fedsft_assets.access import close_to_others
from fedsft_assets.federation.kit_policy import SERVER_CLASSES, SERVER_CONNECTIONS, SITE_CLASSES, SITE_CONNECTION
from fedsft_assets.federation.protocol.tail import Tail
from fedsft_assets.federation.runtimes.interface import UnavailableError
from fedsft_assets.federation.runtimes.poc.kits import ADMIN, SERVER, PocKits
from fedsft_assets.federation.runtimes.poc.services import CONSOLE, PocServices
from fedsft_assets.federation.runtimes.poc.state import RECORD, PocRecord, PocStatus
from fedsft_assets.files import locked_file
from fedsft_assets.specs.runtime import PocSettings

HOST = "127.0.0.1"
_LOCK = "lock"
_VALID_SECONDS = 180 * 24 * 3600  # NVFlare's certificates are valid for twice as long


class PocSystem:
    """The POC in `folder`. Any process may have one of these objects; all act on the same POC.

    `environment` is added to this process's for the processes of the POC. `sites` exist from the start, whichever of
    them the first job needs, since they share the cores.
    """

    def __init__(
        self, folder: Path, settings: PocSettings, environment: Mapping[str, str], sites: Iterable[str] = ()
    ) -> None:
        self.folder = folder
        self.sites = frozenset(sites)
        self._settings = settings
        self._kits = PocKits(folder, settings)
        self._services = PocServices(folder, self._kits, settings, environment)

    @property
    def admin_kit(self) -> Path:
        return self._kits.of(ADMIN)

    def site_folder(self, name: str) -> Path:
        """The folder of NVFlare's `server` or of a site."""
        return self._kits.of(name)

    @property
    def mark(self) -> str:
        """The mark in the environment of all processes of this POC."""
        return self._services.mark

    def prepare(self, sites: Iterable[str] = ()) -> None:
        """Create missing startup kits of the server, an admin and the sites. Starts nothing.

        Raises UnavailableError.
        """
        with self._locked():
            self._prepare(sites)

    def start(self, sites: Iterable[str] = ()) -> list[str]:
        """Start what is not running: the server, all sites of earlier calls, and these.

        Running sites and jobs are not affected. A POC with other settings is restarted, unless it has running jobs.
        Returns the names of what was started, `localhost` for the server. Raises UnavailableError.
        """
        with self._locked():
            record = self._prepare(sites)
            if not record.running(SERVER):
                self._stop()
                record.services = {}
                record = self._with_free_port(record)
            missing = [name for name in record.service_names if not record.running(name)]
            for name in missing:
                record.services[name] = self._services.launch(name, record.sites)
                record.write()
        return missing

    def renew(self) -> None:
        """Recreate all startup kits under a new certificate authority, so that earlier keys are refused.

        Ends all processes of this POC, with the jobs that run in it. Raises UnavailableError.
        """
        with self._locked():
            record = PocRecord.read(self.folder)
            self._stop()
            self._remove()
            self._prepare(record.sites if record else ())

    def stop(self) -> int:
        """End every process of this POC, by force after a grace period. Returns how many there were."""
        if not self.folder.is_dir():  # removing the folder ends no process
            return self._services.stop()
        with self._locked():
            return self._stop()

    def status(self) -> PocStatus:
        record = PocRecord.read(self.folder)
        if record is None:
            return PocStatus(self.folder, "", {})
        running = {name: record.running(name) for name in record.service_names}
        pids = {name: service.pid if service else None for name, service in running.items()}
        return PocStatus(self.folder, f"{HOST}:{record.port}", pids, self._services.running_jobs())

    def started_at(self, name: str) -> float | None:
        """When `localhost` or a site was started, in seconds since the epoch; None if it is not running."""
        record = PocRecord.read(self.folder)
        service = record.running(name) if record else None
        return service.created if service else None

    def end_of_console(self, name: str, lines: int = 15) -> str:
        """The last lines that NVFlare's `server` or a site printed."""
        log = self.site_folder(name) / CONSOLE
        return f"End of {log}:\n{Tail(log).end(lines)}"

    def job_processes(self, job_id: str) -> list[psutil.Process]:
        """All processes of a job: NVFlare's processes, and all that these started."""
        return self._services.job_processes(job_id)

    def kill_job(self, job_id: str) -> None:
        """Kill all processes of a job, including those that they start meanwhile."""
        self._services.kill_job(job_id)

    def _prepare(self, sites: Iterable[str]) -> PocRecord:
        record = PocRecord.read(self.folder)
        wanted = {*self.sites, *sites}
        if record is not None and not self._is_current(record):
            if jobs := self._services.running_jobs():
                raise UnavailableError(
                    f"the POC in {self.folder} was started with other settings and has {len(jobs)} running"
                    f" {'job' if len(jobs) == 1 else 'jobs'}; wait until they end, or stop it: fedsft poc stop"
                )
            self._stop()
            self._remove()
            wanted |= set(record.sites)
            record = None
        if record is None:
            if not wanted:
                raise UnavailableError("a POC needs at least one site; none was given")
            self._remove()
            record = self._new_record(sorted(wanted))
        elif more := wanted - set(record.sites):
            record.sites = sorted({*record.sites, *more})
        else:
            return record
        return self._provisioned(record)

    def _provisioned(self, record: PocRecord) -> PocRecord:
        """The record, written once its kits exist."""
        self._kits.provision(record.sites, record.port, self._services.environment())
        close_to_others(self.folder)  # NVFlare makes its scripts executable for all users
        record.write()
        return record

    def _new_record(self, sites: list[str], port: int | None = None) -> PocRecord:
        return PocRecord(
            folder=str(self.folder),
            port=port or _free_port(),
            sites=sites,
            settings={
                **self._settings.model_dump(mode="json"),
                "allowed": [*SERVER_CLASSES, *SITE_CLASSES],
                "components": [SITE_CONNECTION, SERVER_CONNECTIONS],
            },
            nvflare=importlib.metadata.version("nvflare"),
            prepared=time.time(),
        )

    def _is_current(self, record: PocRecord) -> bool:
        """Whether the kits are complete, valid, and made for these settings and this version of NVFlare."""
        fresh = self._new_record([], port=record.port)
        return (
            (record.settings, record.nvflare) == (fresh.settings, fresh.nvflare)
            and time.time() - record.prepared < _VALID_SECONDS
            and self._kits.complete(record.sites)
        )

    def _with_free_port(self, record: PocRecord) -> PocRecord:
        """The same POC, at another port if its own was taken while it was stopped."""
        if _is_free(record.port):
            return record
        self._remove()
        return self._provisioned(self._new_record(record.sites))

    def _remove(self) -> None:
        """Remove kits and record; results of earlier jobs stay."""
        self._kits.remove()
        (self.folder / RECORD).unlink(missing_ok=True)

    def _stop(self) -> int:
        count = self._services.stop()
        record = PocRecord.read(self.folder)
        if record is not None and record.services:
            record.services = {}
            record.write()
        return count

    def _locked(self) -> contextlib.AbstractContextManager[None]:
        """Only one process at a time changes the POC; others wait."""
        return locked_file(self.folder / _LOCK)


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
        return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
