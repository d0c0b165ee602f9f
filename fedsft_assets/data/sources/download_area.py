"""A download area: complete, verified files of one hub repository, and partial downloads.

    <commit>/<file>                  complete and verified, or absent
    .hub/files/<commit>/<file>.json  size and digest given by the hub
    .hub/parts/<file>/<digest>       a partial download
    .hub/revisions/<revision>        commits that a branch or tag has pointed to, newest last
    .hub/lock                        held while a call works in the area; released when its process ends

Nothing here accesses the network.
"""

import fcntl
import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import orjson

from fedsft_assets.files import publish_file

_log = logging.getLogger(__name__)


class Content(NamedTuple):
    """A file's content according to the hub: size in bytes, None if unknown, and digest in hex."""

    size: int | None
    digest: str


@dataclass(frozen=True)
class DownloadArea:
    """The files of one repository on disk, with the layout shown above."""

    folder: Path

    def path(self, commit: str, file: str) -> Path:
        return self.folder / commit / file

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the area's lock, after waiting for any other call."""
        self._own.mkdir(parents=True, exist_ok=True)
        with (self._own / "lock").open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _log.info("waiting for another download into %s", self.folder)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def has(self, commit: str, file: str) -> bool:
        """Whether the file is present with the content that the hub gave for it."""
        content = self._recorded(commit, file)
        return content is not None and _has_content(self.path(commit, file), content)

    def adopt(self, commit: str, file: str, content: Content) -> bool:
        """Reuse this or another commit's file of the same name if it has the content; return whether one did."""
        path = self.path(commit, file)
        if _has_content(path, content):
            self._write_record(commit, file, content.digest)
            return True
        for other in (self._own / "files").glob("*"):
            known = self._recorded(other.name, file)
            if known and known.digest == content.digest and self.has(other.name, file):
                link = self._own / "link"
                link.unlink(missing_ok=True)
                try:
                    os.link(self.path(other.name, file), link)
                except OSError:  # not every file system supports hard links
                    return False
                self.keep(commit, file, link, content.digest)
                return True
        return False

    def part(self, file: str, digest: str) -> Path:
        """The path of the file's partial download; those of older contents are removed."""
        part = self._own / "parts" / file / digest
        part.parent.mkdir(parents=True, exist_ok=True)
        for old in part.parent.iterdir():
            if old.is_file() and old != part:
                old.unlink()
        return part

    def keep(self, commit: str, file: str, part: Path, digest: str) -> None:
        """Publish a complete, verified download under the file's name."""
        path = self.path(commit, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("rb") as downloaded:
            os.fsync(downloaded.fileno())
        os.replace(part, path)
        self._write_record(commit, file, digest)

    def commits(self, reference: str) -> list[str]:
        """The commits that a branch or tag pointed to when its files were downloaded, newest last."""
        path = self._own / "revisions" / reference
        return path.read_text().split() if path.is_file() else []

    def remember(self, reference: str, commit: str) -> None:
        others = [known for known in self.commits(reference) if known != commit]
        _write(self._own / "revisions" / reference, "\n".join([*others, commit]).encode())

    @property
    def _own(self) -> Path:
        return self.folder / ".hub"

    def _record(self, commit: str, file: str) -> Path:
        return self._own / "files" / commit / f"{file}.json"

    def _recorded(self, commit: str, file: str) -> Content | None:
        """The recorded content; None if there is no record, or a machine crash left it unreadable."""
        try:
            content = orjson.loads(self._record(commit, file).read_bytes())
            return Content(content["size"], content["digest"])
        except (FileNotFoundError, orjson.JSONDecodeError, KeyError, TypeError):
            return None

    def _write_record(self, commit: str, file: str, digest: str) -> None:
        size = self.path(commit, file).stat().st_size
        _write(self._record(commit, file), orjson.dumps({"size": size, "digest": digest}))


def _has_content(path: Path, content: Content) -> bool:
    if not path.is_file() or content.size not in (None, size_of(path)):
        return False
    return content_digest(path, like=content.digest) == content.digest


def content_digest(path: Path, like: str) -> str:
    """The digest of a file's content in hex, of the same kind as `like`.

    The hub identifies large files by their SHA-256, and others by git's SHA-1 of the blob.
    """
    digest = hashlib.sha256()
    if len(like) == 40:
        digest = hashlib.sha1(f"blob {size_of(path)}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: digest).hexdigest()


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _write(path: Path, content: bytes) -> None:
    with publish_file(path) as fresh:
        fresh.write_bytes(content)
