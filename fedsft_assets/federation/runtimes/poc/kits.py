"""The startup kits of a POC: provisioned by NVFlare, then configured with our own settings."""

import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedsft_assets.federation.kit_policy import (
    STUDY_ROLE,
    components,
    keep_server_files,
    read_resources,
    write_server_policy,
    write_site_policy,
)
from fedsft_assets.federation.runtimes.interface import UnavailableError
from fedsft_assets.specs.runtime import PocSettings

SERVER = "localhost"  # NVFlare binds the name it is provisioned with; this one is loopback, any other is all interfaces
ADMIN = "admin@fedsft.local"
# NVFlare's builders of a kit, as in its own examples.
BUILDERS: list[dict[str, Any]] = [
    {
        "path": "nvflare.lighter.impl.workspace.WorkspaceBuilder",
        "args": {"template_file": ["master_template.yml"]},
    },
    {"path": "nvflare.lighter.impl.static_file.StaticFileBuilder", "args": {"config_folder": "config"}},
    {"path": "nvflare.lighter.impl.cert.CertBuilder"},
    {"path": "nvflare.lighter.impl.signature.SignatureBuilder"},
]
_LAUNCHERS = "fedsft_assets.federation.runtimes.poc.launchers"
STATE_FOLDER = "fedsft"  # for the server's state of executions, in the server's folder
_PROJECT = "fedsft"
_ORG = "fedsft"
_SERVER_SETTINGS = {"heart_beat_timeout": 60, "admin_timeout": 30.0}
# Retries for a job that waits for other jobs or GPUs. NVFlare's defaults: 10 s, increasing, and give up after ten.
_SCHEDULER = {"min_schedule_interval": 1.0, "max_schedule_interval": 5.0, "max_schedule_count": 10_000}


class PocKits:
    """The kits of the server, the admin and the sites, in the folder of a POC."""

    def __init__(self, folder: Path, settings: PocSettings) -> None:
        self._folder, self._settings = folder, settings

    def of(self, name: str) -> Path:
        """The kit of NVFlare's `server`, of the admin, or of a site."""
        return self._folder / "kits" / (SERVER if name == "server" else name)

    def complete(self, sites: Iterable[str]) -> bool:
        return all(self.of(name).is_dir() for name in (SERVER, ADMIN, *sites))

    def provision(self, sites: list[str], port: int, environment: Mapping[str, str]) -> None:
        """Make the missing kits, all under the same certificate authority. Raises UnavailableError."""
        import yaml

        workspace, kits = self._folder / "provision", self._folder / "kits"
        workspace.mkdir(parents=True, exist_ok=True)
        kits.mkdir(exist_ok=True)
        project = workspace / "project.yml"
        project.write_text(yaml.safe_dump(_project(sites, port)), encoding="utf-8")
        options = ["-p", str(project), "-w", str(workspace), "--force"]
        command = [sys.executable, "-m", "nvflare.cli", "provision", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(environment))
        if done.returncode != 0:
            raise UnavailableError(
                f"provisioning failed for the POC in {self._folder}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
            )
        (made,) = (workspace / _PROJECT).glob("prod_*")
        for name in (SERVER, ADMIN, *sites):
            if not self.of(name).is_dir():
                (made / name).rename(self.of(name))
                self._configure(name, sites)
        shutil.rmtree(made)

    def remove(self) -> None:
        """Remove all kits and the certificate authority; results of earlier jobs stay."""
        for name in ("kits", "provision"):
            shutil.rmtree(self._folder / name, ignore_errors=True)

    def _configure(self, name: str, sites: list[str]) -> None:
        """Replace NVFlare's default policy, launchers and resources in the kit by our own."""
        if name == ADMIN:
            return
        kit = self.of(name)
        content = read_resources(kit)
        parts = components(content)
        if name == SERVER:
            content["servers"][0].update(_SERVER_SETTINGS)
            keep_server_files(content, self._folder)
            states = self._folder / "states"
            states.mkdir(exist_ok=True)
            (kit / STATE_FOLDER).symlink_to(states)  # kits may be recreated while an execution is unfinished
            parts["process_launcher"]["path"] = f"{_LAUNCHERS}.ServerLauncher"
            parts["job_scheduler"]["args"] = {**_SCHEDULER, "max_jobs": self._settings.max_jobs}
            write_server_policy(kit, content)
        else:
            gpus = self._settings.gpus_of(name, sites)
            parts["resource_manager"]["args"].update(
                num_of_gpus=len(gpus), mem_per_gpu_in_GiB=self._settings.gpu_memory
            )
            parts["process_launcher"]["path"] = f"{_LAUNCHERS}.SiteLauncher"
            write_site_policy(kit, content)


def _project(sites: list[str], port: int) -> dict[str, Any]:
    """NVFlare's project description, with one port for the server and its admin interface."""
    server: dict[str, Any] = {"name": SERVER, "type": "server", "fed_learn_port": port, "admin_port": port}
    clients: list[dict[str, Any]] = [{"name": site, "type": "client"} for site in sites]
    admin: dict[str, Any] = {"name": ADMIN, "type": "admin", "role": STUDY_ROLE}
    return {
        "api_version": 3,
        "name": _PROJECT,
        "description": "one machine",
        "participants": [{**participant, "org": _ORG} for participant in (server, *clients, admin)],
        "builders": BUILDERS,
    }
