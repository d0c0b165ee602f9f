"""Where a server or a site keeps what it must find again when a job is submitted anew for the same execution."""

import json
import shutil
import time
from pathlib import Path

from fedsft_assets.federation.protocol.messages import EXECUTION_KEY

_SECONDS_TO_KEEP = 30 * 24 * 3600.0


def execution_folder(meta_file: Path, root: Path, job_id: str) -> Path:
    """The folder under `root` of the execution that a job's `meta.json` names, or of the job if it names none.

    Others of which nothing was heard for a month are removed.
    """
    meta = json.loads(meta_file.read_text(encoding="utf-8"))
    own = root / str(meta.get(EXECUTION_KEY) or job_id)
    for other in root.glob("*"):
        if other != own and time.time() - other.stat().st_mtime > _SECONDS_TO_KEEP:
            shutil.rmtree(other, ignore_errors=True)
    return own
