"""Where every file lives under FEDSFT_HOME, how it gets there whole, and how its content is named.

Nothing here knows what is inside the files: only paths, atomic publication and digests.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SPLITS = ("training", "validation", "testing")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Store:
    """The layout of one FEDSFT_HOME."""

    home: Path

    def raw(self, dataset: str) -> Path:
        return self.home / "raw" / dataset

    def processed(self, dataset: str) -> Path:
        return self.home / "processed" / dataset

    @property
    def combined(self) -> Path:
        return self.home / "combined"

    def splits(self, dataset: str) -> Path:
        """The folder of a dataset's three splits; `combined` is a dataset here too."""
        return self.combined if dataset == "combined" else self.processed(dataset)

    def base_model(self, preset: str) -> Path:
        return self.home / "base_models" / f"{preset}.nemo"

    def job_folder(self, job: str) -> Path:
        return self.home / "job_folders" / job

    def checkpoint(self, job: str) -> Path:
        """The folder of a job's trained archive (`model.nemo`) and its report (`report.json`)."""
        return self.home / "checkpoints" / job

    @property
    def reports(self) -> Path:
        return self.home / "reports"

    def flare(self, job: str) -> Path:
        """The workspace in which the runtime runs a job."""
        return self.home / "flare" / job

    @property
    def mlflow_uri(self) -> str:
        return f"sqlite:///{self.home / 'mlflow.db'}"

    @property
    def mlflow_artifacts(self) -> Path:
        return self.home / "mlartifacts"


def split_file(folder: Path, split: str) -> Path:
    """The JSONL file of one split in a folder of splits."""
    return folder / f"{split}.jsonl"


@contextmanager
def publish_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`; when the block ends well, it becomes `target` whole.

    Until then, and for ever if the block raises, what was at `target` stays as it was. A process
    that dies between the two renames leaves the old folder as `.<name>.old`, which the next call
    puts back first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.parent / f".{target.name}.new"
    old = target.parent / f".{target.name}.old"
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    try:
        yield fresh
        _fsync_tree(fresh)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        _fsync(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


@contextmanager
def publish_file(target: Path) -> Iterator[Path]:
    """Yield a path beside `target`; when the block ends well, that file replaces `target` at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.parent / f".{target.name}.new"
    try:
        yield fresh
        _fsync(fresh)
        os.replace(fresh, target)
        _fsync(target.parent)
    finally:
        fresh.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def folder_digest(folder: Path) -> str:
    """SHA-256 over the relative names and contents of all files in a folder, in hex."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{file_digest(path)}\n".encode())
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _fsync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        _fsync(path)
