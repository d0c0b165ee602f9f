"""The policy of a startup kit: what jobs may do, in the files of its folder `local/`, which belong to its owner.

Jobs bring no code. They may configure this project's installed components and those that NVFlare adds to every job, and
the study's user has the rights that its own jobs need. NVFlare refuses everything else.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fedsft_assets.files import publish_file

CONTROLLER = "fedsft_assets.federation.server.controller.FederatedSFT"
TRAINER = "fedsft_assets.federation.site.executor.InstalledTrainer"
LOG_STREAMER = "nvflare.app_common.logging.job_log_streamer.JobLogStreamer"  # NVFlare adds it to every job
SITE_CONNECTION = {
    "id": "site_connection",
    "path": "fedsft_assets.federation.connections.site_connection.SiteConnection",
    "args": {},
}
SERVER_CONNECTIONS = {
    "id": "server_connections",
    "path": "fedsft_assets.federation.connections.server_connections.ServerConnections",
    "args": {},
}
# Components that a job may configure.
SERVER_CLASSES: tuple[str, ...] = (CONTROLLER,)
SITE_CLASSES: tuple[str, ...] = (TRAINER, LOG_STREAMER)
STUDY_ROLE = "lead"  # NVFlare's role of the study's user
_RESOURCES = "resources.json"
_SITE_RIGHTS = {
    "submit_job": "any",
    "manage_job": "n:submitter",
    "download_job": "n:submitter",
    "view": "any",
    "report_version": "any",
    "get_job_log": "n:submitter",
    "byoc": "none",
}
_SERVER_RIGHTS = {**_SITE_RIGHTS, "app_command": "n:submitter"}  # to read the journal of a running job


def read_resources(kit: Path) -> dict[str, Any]:
    """The kit's `resources.json` as NVFlare provisioned it."""
    content: dict[str, Any] = json.loads((kit / "local" / f"{_RESOURCES}.default").read_text(encoding="utf-8"))
    return content


def write_site_policy(kit: Path, resources: dict[str, Any], keep_logs: bool = False) -> list[Path]:
    """Allow jobs to start the trainer that is installed at the site, and nothing else; returns the written files.

    With `keep_logs`, jobs cannot stream their logs to the server.
    """
    resources["allow_log_streaming"] = not keep_logs
    resources["components"].append(SITE_CONNECTION)
    allowed = [name for name in SITE_CLASSES if name != LOG_STREAMER or not keep_logs]
    return _write(kit, resources, allowed, _SITE_RIGHTS)


def write_server_policy(kit: Path, resources: dict[str, Any]) -> list[Path]:
    """Allow jobs the installed controller, and the study's user to read its journal; returns the written files."""
    resources["components"].append(SERVER_CONNECTIONS)
    return _write(kit, resources, SERVER_CLASSES, _SERVER_RIGHTS)


def write_simulation_policy(workspace: Path) -> None:
    """Allow the same components in NVFlare's simulator, whose participants share a policy and have no users."""
    (workspace / "local").mkdir(parents=True)
    _write_json(workspace / "local" / _RESOURCES, _classes((*SERVER_CLASSES, *SITE_CLASSES)))


def keep_server_files(resources: dict[str, Any], folder: Path) -> None:
    """Keep a server's jobs and snapshots in this folder instead of NVFlare's default in /tmp."""
    resources["snapshot_persistor"]["args"]["storage"]["args"]["root_dir"] = str(folder / "snapshots")
    components(resources)["job_manager"]["args"]["uri_root"] = str(folder / "jobs")


def components(resources: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The components in a kit's resources, by their ids."""
    return {component["id"]: component for component in resources["components"]}


def _write(kit: Path, resources: dict[str, Any], classes: Iterable[str], rights: dict[str, str]) -> list[Path]:
    """Write files without the suffix `.default`, which take precedence over the provisioned ones."""
    policy = {"format_version": "1.0", "permissions": {STUDY_ROLE: rights}}
    files = {_RESOURCES: {**resources, **_classes(classes)}, "authorization.json": policy}
    return [_write_json(kit / "local" / name, content) for name, content in files.items()]


def _classes(allowed: Iterable[str]) -> dict[str, object]:
    return {"class_allow_list": list(allowed), "class_list_enforcement_mode": "enforce"}


def _write_json(path: Path, content: object) -> Path:
    with publish_file(path) as fresh:
        fresh.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return path
