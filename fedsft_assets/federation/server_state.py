"""What the server part of a job keeps on the disk from round to round, so that another process can go on with it.

One folder for each execution of a job. `state.json` names the files that it stands for and is replaced last, so a
process that dies leaves the state of the last finished round.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fedsft_assets.federation.stream_sending import lie_together
from fedsft_assets.model.tensor_file import TensorInfo
from fedsft_assets.model.tensor_writer import write_tensors

_STATE_FILE = "state.json"
Tensors = dict[str, torch.Tensor]


@dataclass
class Progress:
    """What is known after `finished` rounds.

    `samples` are the records that each site has trained on so far. `best_round` is the round after which the
    model had `best_loss`, the lowest yet; 0 if none was scored. `first` are the digests that sites began with.
    """

    finished: int = 0
    samples: dict[str, int] = field(default_factory=dict)
    best_round: int = 0
    best_loss: float | None = None
    first: str | None = None


class ServerState:
    """The weights after the last finished round, those of the best one, and what the algorithm carries on."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError for a state that cannot be read."""
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / _STATE_FILE
        try:
            self.progress = Progress(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else Progress()
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: is not the state of a job: {error}; remove {folder} to start anew") from error
        self._remove_others()

    def weights(self) -> Tensors:
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
    ) -> Tensors:
        """Write the global model after so many rounds, asking for one tensor after the other; none of it is held.

        `like` says names, types and shapes. What is written counts from `commit_round` on. Returns the model, whose
        memory is that of the file.
        """
        infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in like.items()}
        path = self.model_file(round)
        with _whole(path, lasting=round > 0) as file:  # the base model is read again where no round is finished
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

    def _algorithm_file(self, round: int) -> Path:
        return self.folder / f"algorithm-{round:06d}.pt"

    def _remove_others(self) -> None:
        kept = {self.model_file(k) for k in (self.progress.finished, self.progress.best_round)}
        kept.add(self._algorithm_file(self.progress.finished))
        for path in self.folder.glob("*-*.pt*"):
            if path not in kept:
                path.unlink()


def _write(kept: Mapping[str, Any], path: Path) -> None:
    with _whole(path) as file:
        torch.save(dict(kept), file)


@contextmanager
def _whole(path: Path, lasting: bool = True) -> Iterator[BinaryIO]:
    """A file that has its name only when all of it is on the disk.

    Raises OSError, after which what was written is gone: others need the room to say why.
    """
    fresh = path.with_suffix(".pt.new")
    try:
        with fresh.open("wb") as file:
            yield file
            file.flush()
            if lasting:
                os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException as error:
        fresh.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch hides what the disk said
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise


def _mapped(path: Path) -> Tensors:
    """Tensors whose memory is that of their file."""
    tensors = _read(path, mmap=True)
    lie_together(tensors.values())
    return tensors


def _read(path: Path, mmap: bool = False) -> dict[str, Any]:
    kept: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    return kept
