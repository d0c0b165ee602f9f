"""Folders for the state that a server or site keeps across resubmissions of the same execution."""

import json
import os
import shutil
import time
from pathlib import Path

from fedsft_assets.federation.protocol.messages import EXECUTION_KEY, SITE_STATE_ROOT

_SECONDS_TO_KEEP = 30 * 24 * 3600.0


def execution_folder(meta_file: Path, root: Path, job_id: str) -> Path:
    """The folder under `root` for the execution named in a job's `meta.json`, or for the job if none is named.

    Removes folders of other executions that have not changed for 30 days.
    """
    meta = json.loads(meta_file.read_text(encoding="utf-8"))
    own = root / str(meta.get(EXECUTION_KEY) or job_id)
    for other in root.glob("*"):
        if other != own and time.time() - other.stat().st_mtime > _SECONDS_TO_KEEP:
            shutil.rmtree(other, ignore_errors=True)
    return own


def site_state_folder(run_dir: Path, site: str) -> Path:
    """Folder of a site's state for the execution that the job in `run_dir` belongs to.

    Under FEDSFT_SITE_STATE if set, otherwise beside the jobs in the site's workspace.
    """
    root = Path(os.environ.get(SITE_STATE_ROOT) or run_dir.parent / "fedsft")
    return execution_folder(run_dir / "meta.json", root, run_dir.name) / site
