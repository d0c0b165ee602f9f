"""What a startup kit lets jobs do: the files of its folder `local/`, which only its owner changes.

A job brings no code. Of what is installed, it may configure this project's part of a job and what NVFlare adds to every
job; the study's user may do what a job needs with jobs of its own. Everything else is refused, by NVFlare.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedsft_assets.files import publish_file

SERVER_PART = "fedsft_assets.federation.server.controller.FederatedSFT"
TRAINER = "fedsft_assets.federation.site.executor.InstalledTrainer"
LOG_STREAMER = "nvflare.app_common.logging.job_log_streamer.JobLogStreamer"  # NVFlare adds it to every job
CONNECTION = {
    "id": "site_connection",
    "path": "fedsft_assets.federation.connections.site_connection.SiteConnection",
    "args": {},
}
SERVER_CONNECTIONS = {
    "id": "server_connections",
    "path": "fedsft_assets.federation.connections.server_connections.ServerConnections",
    "args": {},
}
# What a job may configure.
SERVER_CLASSES: tuple[str, ...] = (SERVER_PART,)
SITE_CLASSES: tuple[str, ...] = (TRAINER, LOG_STREAMER)
STUDY_ROLE = "lead"  # of the user that a study has in the federation
_RESOURCES = "resources.json"
_AT_A_SITE = {
    "submit_job": "any",
    "manage_job": "n:submitter",
    "download_job": "n:submitter",
    "view": "any",
    "report_version": "any",
    "get_job_log": "n:submitter",
    "byoc": "none",
}
# How a study reads what a running job writes down.
_AT_THE_SERVER = {**_AT_A_SITE, "app_command": "n:submitter"}


def read_resources(kit: Path) -> dict[str, Any]:
    """As NVFlare has provisioned them."""
    content: dict[str, Any] = json.loads((kit / "local" / f"{_RESOURCES}.default").read_text(encoding="utf-8"))
    return content


def write_site_policy(kit: Path, resources: dict[str, Any], keep_logs: bool = False) -> list[Path]:
    """Let jobs start the trainer that is installed at the site, and nothing else; returns the files."""
    resources["allow_log_streaming"] = not keep_logs
    resources["components"].append(CONNECTION)
    return _write(kit, resources, [one for one in SITE_CLASSES if one != LOG_STREAMER or not keep_logs], _AT_A_SITE)


def write_server_policy(kit: Path, resources: dict[str, Any]) -> list[Path]:
    """Let jobs have the server's part that is installed there, and the study's user read its journal."""
    resources["components"].append(SERVER_CONNECTIONS)
    return _write(kit, resources, SERVER_CLASSES, _AT_THE_SERVER)


def write_simulation_policy(workspace: Path) -> None:
    """The same for all participants of NVFlare's simulator, which have one machine and no users."""
    (workspace / "local").mkdir(parents=True)
    _write_json(workspace / "local" / _RESOURCES, _classes((*SERVER_CLASSES, *SITE_CLASSES)))


def keep_server_files(resources: dict[str, Any], folder: Path) -> None:
    """Have a server's jobs and snapshots in this folder; NVFlare's own is in /tmp."""
    resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(folder / "snapshots")
    components(resources)["job_manager"]["args"]["uri_root"] = str(folder / "jobs")


def components(resources: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """By their ids."""
    return {component["id"]: component for component in resources["components"]}


def _write(kit: Path, resources: dict[str, Any], classes: Iterable[str], rights: dict[str, str]) -> list[Path]:
    """Files without `.default` go before those that come with the kit."""
    policy = {"format_version": "1.0", "permissions": {STUDY_ROLE: rights}}
    files = {_RESOURCES: {**resources, **_classes(classes)}, "authorization.json": policy}
    return [_write_json(kit / "local" / name, content) for name, content in files.items()]


def _classes(allowed: Iterable[str]) -> dict[str, object]:
    return {"class_allow_list": list(allowed), "class_list_enforcement_mode": "enforce"}


def _write_json(path: Path, content: object) -> Path:
    with publish_file(path) as fresh:
        fresh.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path
