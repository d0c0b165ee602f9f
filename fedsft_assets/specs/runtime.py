"""Settings of the runtimes: the POC, the production federation, and timeouts."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from fedsft_assets.specs.yaml_file import Spec


class PocSettings(Spec):
    """How the processes of a POC are started."""

    gpus: str = Field(
        default="",
        pattern=r"^\s*(\d+\s*(,\s*\d+\s*)*)?$",
        description="GPU ids for the sites in turn, as 0,1; empty: all sites see all GPUs",
    )
    gpu_memory: float = Field(default=0, ge=0, description="GiB of each GPU that jobs may ask for")
    threads: int = Field(default=0, ge=0, description="of each trainer; 0 shares the cores among the sites")
    max_jobs: int = Field(default=4, ge=1, description="jobs at the same time; more wait")

    @property
    def gpu_ids(self) -> list[int]:
        return [int(gpu) for gpu in self.gpus.split(",") if gpu.strip()]

    def gpus_of(self, site: str, sites: list[str]) -> list[int]:
        """GPUs of a site, distributed round-robin as in NVFlare's POC."""
        gpus, count, at = self.gpu_ids, len(sites), sites.index(site)
        if not gpus:
            return []
        return [gpus[at % len(gpus)]] if len(gpus) <= count else gpus[at::count]


class Timeouts(Spec):
    """All in seconds, all above zero."""

    connect: float = Field(default=30, gt=0, description="to reach the server the first time")
    reconnect: float = Field(default=300, gt=0, description="of retrying while a running job's server is unreachable")
    sites: float = Field(default=60, gt=0, description="for the sites of a job to be connected")
    command: float = Field(default=30, gt=0, description="for the server's answer to one command")
    download: float = Field(default=60, gt=0, description="for each piece of a job's result")
    abort: float = Field(default=60, gt=0, description="for an aborted job to have ended")


class ProductionSettings(Spec):
    """The federation and the identity to use."""

    startup_kit: Path | None = Field(
        default=None, description="the admin's folder that contains startup/fed_admin.json"
    )
    study: str = Field(default="default", description="the study that jobs are submitted to")
    timeouts: Timeouts = Field(default=Timeouts(), description="in seconds")

    @field_validator("startup_kit")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        return path.expanduser().resolve() if path else path


class RuntimeSettings(Spec):
    """Where and how jobs run. `sites` are the sites of all jobs, for which a POC is started."""

    name: Literal["simulator", "poc", "production"] = "simulator"
    threads_per_trainer: int = Field(default=0, ge=0, description="of the simulator; 0 shares the cores")
    sites: list[str] = []
    poc: PocSettings = PocSettings()
    production: ProductionSettings = ProductionSettings()


SIMULATOR = RuntimeSettings()
