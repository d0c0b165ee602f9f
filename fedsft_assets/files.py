"""Atomic publication of files and folders, and content digests."""

import fcntl
import glob
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

from fedsft_assets.access import close_to_others

_CHUNK = 1 << 20


@contextmanager
def publish_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target`; if the block succeeds, it atomically becomes `target`.

    Until then, or if the block raises, `target` is unchanged. Concurrent publishers each have their own folder, and the
    last one to finish wins. A killed process leaves its folder as `.<name>.new-…`, or between the two renames the old
    one as `.<name>.old`: the next call removes the former and restores the latter.
    """
    parent = target.parent
    parent.mkdir(parents=True, exist_ok=True)
    fresh, old = parent / f".{target.name}.new-{uuid.uuid4().hex}", parent / f".{target.name}.old"
    with ExitStack() as alive:
        with locked(parent):
            _recover(target, old)
            fresh.mkdir()
            alive.enter_context(locked(fresh))
        try:
            yield fresh
            fsync_tree(fresh)
            with locked(parent):
                if target.exists():
                    target.rename(old)
                fresh.rename(target)
                fsync(parent)
                shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)


def _recover(target: Path, old: Path) -> None:
    """Clean up after a process that was killed while publishing."""
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    remove_left(target)


def remove_left(target: Path) -> None:
    """Remove leftovers of processes that were killed while publishing."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.new-*"):
        try:
            with locked(left, wait=False):
                shutil.rmtree(left, ignore_errors=True)
        except (BlockingIOError, FileNotFoundError, PermissionError):
            continue  # in use, just removed, or another user's


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold the folder's lock, at most until this process ends. Raises BlockingIOError if it is held and not `wait`."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(handle)


@contextmanager
def locked_file(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a lock file, which is created if necessary. Raises BlockingIOError as `locked` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with locked(path, wait):
        yield


@contextmanager
def publish_file(target: Path) -> Iterator[Path]:
    """Yield a path beside `target`; if the block succeeds, the file there atomically replaces `target`.

    Concurrent publishers each have their own path, and the last one to finish wins. Leftovers of a killed process are
    removed by the next call.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_left(target)
    with own_folder(target) as folder:
        fresh = folder / target.name
        yield fresh
        close_to_others(fresh)
        fsync(fresh)
        os.replace(fresh, target)
        fsync(target.parent)


@contextmanager
def own_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, locked, and removed at the end.

    Does not lock the parent folder, whose lock holder may be publishing it as a whole.
    """
    while True:
        folder = target.parent / f".{target.name}.new-{uuid.uuid4().hex}"
        folder.mkdir()
        with ExitStack() as alive:
            try:
                alive.enter_context(locked(folder))
                folder.stat()
            except FileNotFoundError:
                continue  # another call removed it as a leftover before it was locked
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
        return


class HashedFile:
    """A new file whose blocks are written and hashed by a thread while the caller produces the next one.

    After the `with` block, the file is on disk and `digest` is its SHA-256 in hex.
    """

    def __init__(self, path: Path) -> None:
        self.digest = ""
        self._file = path.open("wb")
        self._hash = hashlib.sha256()
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._file, self._thread:
            if kind is None:
                self._wait()
                self._file.flush()
                os.fsync(self._file.fileno())
                self.digest = self._hash.hexdigest()

    def write(self, block: bytes) -> None:
        """Queue a block; waits for the previous one and raises its error, if any."""
        self._wait()
        self._last = self._thread.submit(self._write, block)

    def _wait(self) -> None:
        if self._last is not None:
            self._last.result()

    def _write(self, block: bytes) -> None:
        self._file.write(block)
        self._hash.update(block)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def folder_digest(folder: Path, names: Iterable[str] | None = None) -> str:
    """SHA-256 over relative names and contents of a folder's files, or only those in `names`, in hex."""
    paths = (p for p in folder.rglob("*") if p.is_file()) if names is None else (folder / name for name in names)
    return digest_of({path.relative_to(folder).as_posix(): file_digest(path) for path in paths})


def digest_of(files: Mapping[str, str]) -> str:
    """The `folder_digest` of files with these relative names and digests."""
    lines = (f"{name}\0{digest}\n" for name, digest in sorted(files.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def link_or_copy(source: str, target: str) -> None:
    """Hard-link a file that is never changed in place, or copy it if that is not possible."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_tree(folder: Path) -> None:
    """Sync a folder to disk, and make it private, whatever the modes of copied files."""
    close_to_others(folder)
    for path in [*folder.rglob("*"), folder]:
        fsync(path)
