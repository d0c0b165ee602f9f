"""The server's state on disk after each round, from which a restarted server resumes.

One folder per execution. `state.json` refers to the other files and is replaced last, so a killed process leaves the
state of the last finished round intact.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedsft_assets.federation.protocol.whole_file import whole_file
from fedsft_assets.federation.transport import ContiguousTensors
from fedsft_assets.model.archive.torch_reader import TensorInfo
from fedsft_assets.model.archive.torch_writer import write_tensors

_STATE_FILE = "state.json"
_HANDED_OVER_FILE = "handed_over.json"
_SECONDS_TO_KEEP = 3600.0  # keep archived state: the server may die before reporting success


@dataclass
class RoundsDone:
    """Progress after `finished` rounds.

    `samples` counts the records that each site has trained on so far. `best_round` is the round after which the model
    had the lowest loss, `best_loss`; 0 if none was scored. `first` holds the digests of the sites' initial model.
    `sent_for` lists sites for which the job was ended to be resubmitted and that have not joined since. `records` are
    self-reported training record counts, for sites whose count the job does not know.
    """

    finished: int = 0
    samples: dict[str, int] = field(default_factory=dict)
    best_round: int = 0
    best_loss: float | None = None
    first: str | None = None
    sent_for: list[str] = field(default_factory=list)
    records: dict[str, int] = field(default_factory=dict)


class ServerState:
    """The weights of the last finished round and of the best one, and the algorithm's state."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError if the state is unreadable."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _STATE_FILE
        try:
            self.progress = (
                RoundsDone(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else RoundsDone()
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: not a valid job state: {error}; remove {folder} to start over") from error
        self._remove_others()

    def executions(self) -> list[str]:
        """Names of all executions that can be resumed here, including this one."""
        return sorted(path.name for path in self.folder.parent.iterdir() if path.is_dir())

    def weights(self) -> ContiguousTensors:
        """The global model after the last finished round, memory-mapped."""
        return _mapped(self.model_file(self.progress.finished))

    def algorithm(self) -> dict[str, Any]:
        """The algorithm's state after the last finished round."""
        path = self._algorithm_file(self.progress.finished)
        return _read(path) if path.exists() else {}

    def model_file(self, round: int) -> Path:
        """File of the global model after `round` rounds; only the last and the best are kept."""
        return self.folder / f"model-{round:06d}.pt"

    def write_weights(
        self, round: int, like: Mapping[str, torch.Tensor], made: Callable[[str], torch.Tensor]
    ) -> ContiguousTensors:
        """Write the global model after `round` rounds, requesting one tensor at a time from `made`.

        `like` gives names, dtypes and shapes. The file takes effect with `commit_round`. Returns the model,
        memory-mapped.
        """
        infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in like.items()}
        path = self.model_file(round)
        with whole_file(path, lasting=round > 0) as file:  # before the first round, the base model is read again anyway
            write_tensors(file, infos, made)
        return _mapped(path)

    def commit_round(self, algorithm: Mapping[str, Any]) -> None:
        """Save the current progress, to resume from; the weights must have been written."""
        if algorithm:
            _write(algorithm, self._algorithm_file(self.progress.finished))
        self.commit_progress()

    def commit_progress(self) -> None:
        """Save the current progress, with the weights unchanged."""
        fresh = self.folder / f"{_STATE_FILE}.new"
        with fresh.open("w", encoding="utf-8") as file:
            json.dump(asdict(self.progress), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self.folder / _STATE_FILE)
        self._remove_others()

    def hand_over_to(self, run_dir: Path) -> None:
        """Record that the results are in `run_dir`, which NVFlare archives and then removes.

        The state is kept until then: if the server died in between, the result would be lost.
        """
        note = self.folder / _HANDED_OVER_FILE
        note.write_text(json.dumps({"run_dir": str(run_dir)}), encoding="utf-8")

    def _algorithm_file(self, round: int) -> Path:
        return self.folder / f"algorithm-{round:06d}.pt"

    def _remove_others(self) -> None:
        kept = {self.model_file(k) for k in (self.progress.finished, self.progress.best_round)}
        kept.add(self._algorithm_file(self.progress.finished))
        for path in self.folder.glob("*-*.pt*"):
            if path not in kept:
                path.unlink()


def remove_archived(root: Path, but: Path) -> None:
    """Remove states under `root` whose results NVFlare has archived, except the folder `but`."""
    for note in root.glob(f"*/{_HANDED_OVER_FILE}"):
        try:
            run_dir = Path(json.loads(note.read_text(encoding="utf-8"))["run_dir"])
            fresh = time.time() - note.stat().st_mtime < _SECONDS_TO_KEEP
        except (OSError, ValueError, KeyError):
            continue  # being removed by another job's server, or only half written
        if note.parent != but and not fresh and not run_dir.exists():
            shutil.rmtree(note.parent, ignore_errors=True)


def _write(kept: Mapping[str, Any], path: Path) -> None:
    with whole_file(path) as file:
        torch.save(dict(kept), file)


def _mapped(path: Path) -> ContiguousTensors:

    return ContiguousTensors(_read(path, mmap=True))


def _read(path: Path, mmap: bool = False) -> dict[str, Any]:
    kept: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    return kept
