"""The recorded state of a POC in `poc.json`, and its status for display."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

from fedsft_assets.federation.runtimes.poc.kits import SERVER
from fedsft_assets.files import publish_file

RECORD = "poc.json"


@dataclass(frozen=True)
class Service:
    """A process of the POC; its creation time tells it from a later process with the same pid."""

    pid: int
    created: float
    """In seconds since the epoch."""

    @property
    def is_running(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.created) < 1 and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


@dataclass
class PocRecord:
    """The content of `poc.json`: the settings of the kits, and the processes started from them."""

    folder: str
    port: int
    sites: list[str]
    settings: dict[str, Any]
    nvflare: str
    prepared: float
    """When the kits were created, in seconds since the epoch."""
    services: dict[str, Service] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """None if there is no valid record, or if it was copied here from another folder."""
        try:
            content = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            services = {name: Service(**service) for name, service in content.pop("services").items()}
            record = cls(**content, services=services)
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return record if record.folder == str(folder) else None

    def write(self) -> None:
        with publish_file(Path(self.folder) / RECORD) as fresh:
            fresh.write_text(json.dumps(asdict(self), indent=2), encoding="utf-8")

    @property
    def service_names(self) -> list[str]:
        """`localhost`, which is the server, and the sites."""
        return [SERVER, *self.sites]

    def running(self, name: str) -> Service | None:
        """The service of that name if its process is alive."""
        service = self.services.get(name)
        return service if service and service.is_running else None


@dataclass(frozen=True)
class PocStatus:
    """`services` maps `localhost`, which is the server, and each site to its pid, or None if it is not running."""

    folder: Path
    address: str
    services: dict[str, int | None]
    jobs: list[str] = field(default_factory=list)
    """Ids of the FLARE jobs that have processes now."""

    @property
    def state(self) -> str:
        running = [name for name, pid in self.services.items() if pid]
        if not self.services:
            return "not prepared"
        if not running:
            return "stopped"
        return "running" if len(running) == len(self.services) else "incomplete"

    def describe(self) -> str:
        """The status as a few lines of text."""
        lines = [f"POC in {self.folder}: {self.state}"]
        if self.services:
            lines.append(f"server {self.address}")
        for name, pid in self.services.items():
            lines.append(f"{'server' if name == SERVER else name:10} {f'pid {pid}' if pid else 'not running'}")
        return "\n".join([*lines, *(f"job        {job}" for job in self.jobs)])
