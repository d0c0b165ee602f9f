"""Jobs for NVFlare that take seconds: a server part that writes a journal and hands it out, sites that do nothing."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedsft_assets.federation import kit_policy
from fedsft_assets.settings import PROJECT

SCRIBE = "fedsft_assets_tests.federation.scribe.Scribe"
IDLER = "nvflare.app_common.np.np_trainer.NPTrainer"
_EXECUTOR = {"tasks": ["none"], "executor": {"path": IDLER, "args": {}}}


@contextmanager
def small_jobs_allowed() -> Iterator[None]:
    """Kits that are made in this block take these jobs, beside the project's own, and a POC finds their code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kit_policy, "SERVER_CLASSES", (*kit_policy.SERVER_CLASSES, SCRIBE))
        patch.setattr(kit_policy, "SITE_CLASSES", (*kit_policy.SITE_CLASSES, IDLER))
        patch.setenv("PYTHONPATH", str(PROJECT), prepend=os.pathsep)
        yield


def write_job(
    folder: Path, sites: list[str], lines: list[str], seconds_between: float = 0.2, fails: bool = False
) -> Path:
    """The job folder `folder`, of a job that writes `lines` into its journal."""
    scribe = {"lines": lines, "seconds_between": seconds_between, "fails": fails}
    workflow = {"id": "scribe", "path": SCRIBE, "args": scribe}
    files: dict[str, object] = {
        "meta.json": {
            "name": folder.name,
            "resource_spec": {},
            "min_clients": len(sites),
            "mandatory_clients": sites,
            "deploy_map": {"app_server": ["server"], "app_sites": sites},
        },
        "app_server/config/config_fed_server.json": {"format_version": 2, "workflows": [workflow], "components": []},
        "app_sites/config/config_fed_client.json": {"format_version": 2, "executors": [_EXECUTOR], "components": []},
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")
    return folder
