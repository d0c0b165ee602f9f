"""A download area: files of one hub repository, whole and verified, and what has arrived of others.

    <commit>/<file>                  whole and verified, or absent
    .hub/files/<commit>/<file>.json  size and digest that the hub names for it
    .hub/parts/<file>/<digest>       what has arrived of a file so far
    .hub/revisions/<revision>        commits that a branch or tag stood for, the newest last
    .hub/lock                        held while a call works in the area; its holder's death frees it

Knows files and digests only; nothing here talks to a hub.
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
    """What the hub says that a file is: its bytes, None if unsaid, and the digest that names them."""

    size: int | None
    digest: str


@dataclass(frozen=True)
class DownloadArea:
    """Where the files of one repository are kept, as the module's head shows it."""

    folder: Path

    def path(self, commit: str, file: str) -> Path:
        return self.folder / commit / file

    @contextmanager
    def locked(self) -> Iterator[None]:
        self._own.mkdir(parents=True, exist_ok=True)
        with (self._own / "lock").open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _log.info("waiting for another download into %s", self.folder)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def has(self, commit: str, file: str) -> bool:
        """Whether the file is here with the content that the hub named for it."""
        content = self._recorded(commit, file)
        return content is not None and _is(self.path(commit, file), content)

    def adopt(self, commit: str, file: str, content: Content) -> bool:
        """Take the content from this or another commit's file of the same name, if one has it."""
        path = self.path(commit, file)
        if _is(path, content):
            self._write_record(commit, file, content.digest)
            return True
        for other in (self._own / "files").glob("*"):
            known = self._recorded(other.name, file)
            if known and known.digest == content.digest and self.has(other.name, file):
                link = self._own / "link"
                link.unlink(missing_ok=True)
                try:
                    os.link(self.path(other.name, file), link)
                except OSError:  # not every file system has links
                    return False
                self.keep(commit, file, link, content.digest)
                return True
        return False

    def part(self, file: str, digest: str) -> Path:
        """Where the file's bytes gather until they are whole; parts of older contents are removed."""
        part = self._own / "parts" / file / digest
        part.parent.mkdir(parents=True, exist_ok=True)
        for old in part.parent.iterdir():
            if old.is_file() and old != part:
                old.unlink()
        return part

    def keep(self, commit: str, file: str, part: Path, digest: str) -> None:
        """Publish a verified part under the file's name."""
        path = self.path(commit, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("rb") as arrived:
            os.fsync(arrived.fileno())
        os.replace(part, path)
        self._write_record(commit, file, digest)

    def commits(self, reference: str) -> list[str]:
        """The commits that a branch or tag stood for when its files were brought here, the newest last."""
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
        """What the hub named; None if that was not recorded, or a crash of the machine left it unreadable."""
        try:
            content = orjson.loads(self._record(commit, file).read_bytes())
            return Content(content["size"], content["digest"])
        except (FileNotFoundError, orjson.JSONDecodeError, KeyError, TypeError):
            return None

    def _write_record(self, commit: str, file: str, digest: str) -> None:
        size = self.path(commit, file).stat().st_size
        _write(self._record(commit, file), orjson.dumps({"size": size, "digest": digest}))


def _is(path: Path, content: Content) -> bool:
    if not path.is_file() or content.size not in (None, size_of(path)):
        return False
    return content_digest(path, like=content.digest) == content.digest


def content_digest(path: Path, like: str) -> str:
    """The digest of a file's content, in hex, of the kind that `like` is.

    The hub names a large file by its SHA-256, and any other by the SHA-1 that git gives its blob.
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
