"""What a site keeps on its disk from round to round: the optimizer's moments, and what the algorithm carries on.

A trainer that is started again for the same execution of a job goes on with it. It goes when the last round is done,
and, of a job that never came so far, when the server has nothing any more with which that could be gone on.
"""

import contextlib
import os
import shutil
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from fedsft_assets.federation.protocol.messages import SITE_STATE_ROOT
from fedsft_assets.federation.protocol.state_folder import execution_folder
from fedsft_assets.federation.protocol.whole_file import whole_file

_SECONDS_TO_BE_KNOWN = 600.0  # what the server says of its executions may be as old as its message


class SiteState:
    """The files of one process of a site's trainer in one execution of a job."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self._folder, self._rank = folder, rank

    def save(self, finished_rounds: int, kept: dict[str, Any]) -> None:
        """Keep tensors and plain values; what was kept of earlier rounds goes, but for the last one.

        A round that the server does not finish is done again, from what there was before it. Raises OSError.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(finished_rounds)
        with whole_file(path) as file:
            torch.save(kept, file)
        for other in self._folder.glob(f"{self._rank}-*.pt"):
            if other not in (path, self._path(finished_rounds - 1)):
                other.unlink()

    def clear(self) -> None:
        """Keep nothing of the rounds: none is left.

        What the site computes in stays (`site_precision`): a server that fails now asks for the last score again.
        """
        for path in self._folder.glob(f"{self._rank}-*"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something is kept yet
            self._folder.rmdir()
            self._folder.parent.rmdir()

    def clear_others(self, known: Collection[str]) -> None:
        """Remove what this site keeps for executions that the server does not know, and so cannot go on with."""
        for other in self._folder.parent.parent.glob(f"*/{self._folder.name}"):
            if other.parent.name in known or other == self._folder:
                continue
            with contextlib.suppress(OSError):  # another job has just removed it, or another site keeps something
                if time.time() - other.stat().st_mtime > _SECONDS_TO_BE_KNOWN:
                    shutil.rmtree(other)
                    other.parent.rmdir()

    def load(self, finished_rounds: int, device: torch.device) -> dict[str, Any] | None:
        """What was kept after so many rounds, with its tensors on that device, or None."""
        path = self._path(finished_rounds)
        if not path.exists():
            return None
        kept: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        return kept

    def _path(self, finished_rounds: int) -> Path:
        return self._folder / f"{self._rank}-{finished_rounds:06d}.pt"


def site_state_folder(run_dir: Path, site: str) -> Path:
    """Where a site keeps its state of the execution that the job in `run_dir` belongs to.

    Under FEDSFT_SITE_STATE, else beside the jobs in the site's workspace.
    """
    root = Path(os.environ.get(SITE_STATE_ROOT) or run_dir.parent / "fedsft")
    return execution_folder(run_dir / "meta.json", root, run_dir.name) / site
