"""Checks, before a job is submitted, that the server grants the study's user every right that a job needs.

NVFlare checks most rights against a job and does not list them. So a probe job is submitted that no server can start,
because it requires a site that does not exist; each right is tried on that job, which is then aborted and deleted.
"""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedsft_assets.federation.protocol.messages import JOURNAL_COMMAND
from fedsft_assets.federation.runtimes.flare.session import FlareSession
from fedsft_assets.federation.runtimes.interface import RefusedError

_NO_SUCH_SITE = "fedsft-no-such-site"
_PROBE_JOB: dict[str, object] = {
    "meta.json": {
        "name": "fedsft-rights",
        "resource_spec": {},
        "min_clients": 1,
        "mandatory_clients": [_NO_SUCH_SITE],
        "deploy_map": {"app_server": ["server"], "app_nowhere": [_NO_SUCH_SITE]},
    },
    "app_server/config/config_fed_server.json": {"format_version": 2, "workflows": [], "components": []},
    "app_nowhere/config/config_fed_client.json": {"format_version": 2, "executors": [], "components": []},
}
Command = Callable[[Any, str], object]
# NVFlare's names of the rights, what each is needed for, and a command that tries it on a job.
JOB_RIGHTS: dict[str, tuple[str, Command]] = {
    "view": ("to follow a job", lambda session, job_id: session.get_job_meta(job_id)),
    "app_command": (
        "to read the journal of a running job",
        lambda session, job_id: session.do_app_command(job_id, JOURNAL_COMMAND, {"offset": 0}),
    ),
    "get_job_log": (
        "to report why a job failed",
        lambda session, job_id: session.get_job_logs(job_id, target="server"),
    ),
    "download_job": ("to download a job's result", lambda session, job_id: session.download_job_result(job_id)),
    "manage_job": ("to abort a job", lambda session, job_id: session.abort_job(job_id)),
}


def require_rights(session: FlareSession) -> None:
    """Raise RefusedError listing all missing rights, unless the user has every right that a job needs."""
    try:
        job_id = session.submit_job(_write_probe_job(session.folder / "rights"))
    except RefusedError:
        missing = ["submit_job (to submit a job)"]
    else:
        missing = session.call(lambda api: _missing_rights(api, job_id))
    if missing:
        raise RefusedError(
            f"the server at {session.address} does not grant the user of {session.startup_kit} all the rights that a"
            f" job needs; missing: {', '.join(missing)}; add them to the permissions in the server's"
            " local/authorization.json, as in docs/production.md, and restart the server"
        )


def _write_probe_job(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in _PROBE_JOB.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    return folder


def _missing_rights(api: Any, job_id: str) -> list[str]:
    missing = [
        f"{right} ({purpose})"
        for right, (purpose, command) in JOB_RIGHTS.items()
        if not _is_authorized(api, command, job_id)
    ]
    _is_authorized(api, lambda api, job_id: api.delete_job(job_id), job_id)
    return missing


def _is_authorized(api: Any, command: Command, job_id: str) -> bool:
    """NVFlare checks the right first, so any other error about the job means that the right is granted."""
    from nvflare.fuel.flare_api import api_spec

    try:
        with contextlib.suppress(
            api_spec.JobNotFound, api_spec.JobNotRunning, api_spec.JobNotDone, api_spec.InternalError
        ):
            command(api, job_id)
    except api_spec.AuthorizationError:
        return False
    return True
