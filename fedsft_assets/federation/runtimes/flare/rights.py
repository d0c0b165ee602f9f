"""Whether the server lets a study's user do all that a job needs, found out before there is one.

NVFlare asks for most rights about a job, and tells nobody which it would give. So a job is handed in that no server can
start, for it wants a site that does not exist; everything is asked for about that one, and it is ended.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedsft_assets.federation.protocol.messages import JOURNAL_COMMAND
from fedsft_assets.federation.runtimes.flare.session import FlareSession
from fedsft_assets.federation.runtimes.interface import RefusedError

_NOWHERE = "fedsft-no-such-site"
_APPS = {"app_server": ["server"], "app_nowhere": [_NOWHERE]}
_FILES: dict[str, object] = {
    "meta.json": {
        "name": "fedsft-rights",
        "resource_spec": {},
        "min_clients": 1,
        "mandatory_clients": [_NOWHERE],
        "deploy_map": _APPS,
    },
    "app_server/config/config_fed_server.json": {"format_version": 2, "workflows": [], "components": []},
    "app_nowhere/config/config_fed_client.json": {"format_version": 2, "executors": [], "components": []},
}
Ask = Callable[[Any, str], object]
# The rights by NVFlare's names, with what each is for.
_OF_A_JOB: dict[str, tuple[str, Ask]] = {
    "view": ("to follow a job", lambda session, job_id: session.get_job_meta(job_id)),
    "app_command": (
        "to read the journal of a running job",
        lambda session, job_id: session.do_app_command(job_id, JOURNAL_COMMAND, {"offset": 0}),
    ),
    "get_job_log": ("to say why a job failed", lambda session, job_id: session.get_job_logs(job_id, target="server")),
    "download_job": ("to fetch what a job made", lambda session, job_id: session.download_job_result(job_id)),
    "manage_job": ("to end a job", lambda session, job_id: session.abort_job(job_id)),
}


def require_rights(session: FlareSession, folder: Path) -> None:
    """Raises RefusedError that names every right that is missing. `folder` is for the job that is never run."""
    job_id = session.call(lambda api: _submitted(api, folder))
    missing = session.call(lambda api: _missing(api, job_id)) if job_id else ["submit_job (to hand in a job)"]
    if missing:
        raise RefusedError(
            f"the server at {session.address} does not give the user of {session.startup_kit} what a job needs:"
            f" {', '.join(missing)}; add it to the permissions in the server's local/authorization.json, as"
            " docs/production.md has them, and restart the server"
        )


def _missing(api: Any, job_id: str) -> list[str]:
    missing = [f"{right} ({purpose})" for right, (purpose, ask) in _OF_A_JOB.items() if not _allows(api, ask, job_id)]
    _allows(api, lambda api, job_id: api.delete_job(job_id), job_id)
    return missing


def _submitted(api: Any, folder: Path) -> str | None:
    """The id of a job that nobody can start; None if this user may not submit any."""
    from nvflare.fuel.flare_api.api_spec import AuthorizationError

    job = folder / "rights"
    shutil.rmtree(job, ignore_errors=True)
    for name, content in _FILES.items():
        path = job / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    try:
        return str(api.submit_job(str(job)))
    except AuthorizationError:
        return None


def _allows(api: Any, ask: Ask, job_id: str) -> bool:
    """NVFlare looks at the right first: any other complaint about the job comes from a server that allows it."""
    from nvflare.fuel.flare_api import api_spec

    try:
        ask(api, job_id)
    except api_spec.AuthorizationError:
        return False
    except (api_spec.JobNotFound, api_spec.JobNotRunning, api_spec.JobNotDone, api_spec.InternalError):
        return True
    return True
