"""What the server part of a job keeps on the disk from round to round, so that another process can go on with it.

One folder for each execution of a job. `state.json` names the files that it stands for and is replaced last, so a
process that dies leaves the state of the last finished round.
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
_SECONDS_TO_KEEP = 3600.0  # the state of a job whose result is archived: the server may die before it says so


@dataclass
class RoundsDone:
    """What is known after `finished` rounds.

    `samples` are the records that each site has trained on so far. `best_round` is the round after which the
    model had `best_loss`, the lowest yet; 0 if none was scored. `first` are the digests that sites began with.
    `sent_for` are sites for whose sake the job was ended to be submitted again, and that have not got it since.
    `records` are how many a site says that it trains on, where the job does not.
    """

    finished: int = 0
    samples: dict[str, int] = field(default_factory=dict)
    best_round: int = 0
    best_loss: float | None = None
    first: str | None = None
    sent_for: list[str] = field(default_factory=list)
    records: dict[str, int] = field(default_factory=dict)


class ServerState:
    """The weights after the last finished round, those of the best one, and what the algorithm carries on."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError for a state that cannot be read."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _STATE_FILE
        try:
            self.progress = (
                RoundsDone(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else RoundsDone()
            )
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: is not the state of a job: {error}; remove {folder} to start anew") from error
        self._remove_others()

    def executions(self) -> list[str]:
        """All that can be gone on with here, by the names of their folders; this one is among them."""
        return sorted(path.name for path in self.folder.parent.iterdir() if path.is_dir())

    def weights(self) -> ContiguousTensors:
        """The global model after the last finished round, whose memory is that of its file."""
        return _mapped(self.model_file(self.progress.finished))

    def algorithm(self) -> dict[str, Any]:
        """What the algorithm kept after the last finished round."""
        path = self._algorithm_file(self.progress.finished)
        return _read(path) if path.exists() else {}

    def model_file(self, round: int) -> Path:
        """The file of the global model after so many rounds; only the last and the best are there."""
        return self.folder / f"model-{round:06d}.pt"

    def commit(self, weights: Mapping[str, torch.Tensor], algorithm: Mapping[str, Any]) -> None:
        """Make the progress as it stands, and these weights after it, what a later process begins with."""
        self.write_weights(self.progress.finished, weights, weights.__getitem__)
        self.commit_round(algorithm)

    def write_weights(
        self, round: int, like: Mapping[str, torch.Tensor], made: Callable[[str], torch.Tensor]
    ) -> ContiguousTensors:
        """Write the global model after so many rounds, asking for one tensor after the other; none of it is held.

        `like` says names, types and shapes. What is written counts from `commit_round` on. Returns the model, whose
        memory is that of the file.
        """
        infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in like.items()}
        path = self.model_file(round)
        with whole_file(path, lasting=round > 0) as file:  # the base model is read again where no round is finished
            write_tensors(file, infos, made)
        return _mapped(path)

    def commit_round(self, algorithm: Mapping[str, Any]) -> None:
        """Make the progress as it stands what a later process begins with; its weights are written."""
        if algorithm:
            _write(algorithm, self._algorithm_file(self.progress.finished))
        self.commit_progress()

    def commit_progress(self) -> None:
        """The same with the weights that are there."""
        fresh = self.folder / f"{_STATE_FILE}.new"
        with fresh.open("w", encoding="utf-8") as file:
            json.dump(asdict(self.progress), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, self.folder / _STATE_FILE)
        self._remove_others()

    def hand_over_to(self, run_dir: Path) -> None:
        """Note that all that the execution was for is in this folder, which NVFlare archives and removes.

        Until then this state stays: of a server that dies in between nobody else could get the result.
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
    """Remove the states under `root` whose executions NVFlare has archived, except the folder `but`."""
    for note in root.glob(f"*/{_HANDED_OVER_FILE}"):
        try:
            run_dir = Path(json.loads(note.read_text(encoding="utf-8"))["run_dir"])
            fresh = time.time() - note.stat().st_mtime < _SECONDS_TO_KEEP
        except (OSError, ValueError, KeyError):
            continue  # another job's server removes it just now, or died while it wrote the note
        if note.parent != but and not fresh and not run_dir.exists():
            shutil.rmtree(note.parent, ignore_errors=True)


def _write(kept: Mapping[str, Any], path: Path) -> None:
    with whole_file(path) as file:
        torch.save(dict(kept), file)


def _mapped(path: Path) -> ContiguousTensors:
    """Tensors whose memory is that of their file."""
    return ContiguousTensors(_read(path, mmap=True))


def _read(path: Path, mmap: bool = False) -> dict[str, Any]:
    kept: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    return kept
