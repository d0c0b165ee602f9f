"""A site's state on disk between rounds: optimizer moments and algorithm state.

A restarted trainer of the same execution resumes from it. It is removed after the last round, or, for an unfinished
job, once the server can no longer resume the execution.
"""

import contextlib
import shutil
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from fedsft_assets.federation.protocol.whole_file import whole_file

_SECONDS_TO_BE_KNOWN = 600.0  # the server's list of executions may be as old as its message


class SiteState:
    """The files of one rank of a site's trainer in one execution."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self._folder, self._rank = folder, rank

    def save(self, finished_rounds: int, kept: dict[str, Any]) -> None:
        """Save tensors and plain values, keeping the previous round and removing older ones.

        A round that the server does not finish is repeated from the previous state. Raises OSError.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(finished_rounds)
        with whole_file(path) as file:
            torch.save(kept, file)
        for other in self._folder.glob(f"{self._rank}-*.pt"):
            if other not in (path, self._path(finished_rounds - 1)):
                other.unlink()

    def clear(self) -> None:
        """Remove the state of all rounds after the last one.

        The precision (`site_precision`) is kept: a server that fails now requests the last score again.
        """
        for path in self._folder.glob(f"{self._rank}-*"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty
            self._folder.rmdir()
            self._folder.parent.rmdir()

    def clear_others(self, known: Collection[str]) -> None:
        """Remove the state of executions that the server does not know and so cannot resume."""
        for other in self._folder.parent.parent.glob(f"*/{self._folder.name}"):
            if other.parent.name in known or other == self._folder:
                continue
            with contextlib.suppress(OSError):  # removed by another job, or in use by another site
                if time.time() - other.stat().st_mtime > _SECONDS_TO_BE_KNOWN:
                    shutil.rmtree(other)
                    other.parent.rmdir()

    def load(self, finished_rounds: int, device: torch.device) -> dict[str, Any] | None:
        """The state after `finished_rounds`, with tensors on `device`, or None."""
        path = self._path(finished_rounds)
        if not path.exists():
            return None
        kept: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        return kept

    def _path(self, finished_rounds: int) -> Path:
        return self._folder / f"{self._rank}-{finished_rounds:06d}.pt"
