"""The files of an untrusted archive: a `.nemo` tar, plain or gzipped, or a folder of its files.

Files are read in place; nothing is extracted under a name chosen by the archive.
"""

import gzip
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from fedsft_assets.model.archive.file_window import FileWindow
from fedsft_assets.model.errors import ModelError

_COMPRESSION = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7z": "xz", b"PK\3": "zip", b"\x28\xb5\x2f": "zstandard"}
_SPARE_DISK = 1 << 30  # bytes to leave free
_BLOCK = 8 << 20  # bytes


@dataclass(frozen=True)
class Limits:
    """Limits on an archive. Top-level files have a `depth` of 1; `unpacked_slack` is in bytes.

    A gzip bomb unpacks to a thousand times its size; weights rarely to more than twice theirs.
    """

    members: int = 10_000
    depth: int = 8
    unpacked_ratio: int = 20
    unpacked_slack: int = 64 << 20


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class Member:
    """One file of a tar, folder or zip: the `size` bytes of `file` that begin at `start`."""

    name: str
    file: BinaryIO
    start: int
    size: int

    def open(self, offset: int = 0, size: int | None = None) -> BinaryIO:
        """Open the file, or a part of it that the caller has checked to be inside the file."""
        window = FileWindow(self.file, self.start + offset, self.size - offset if size is None else size)
        return cast(BinaryIO, window)

    def content(self, max_bytes: int, where: str) -> bytes:
        """All bytes of a small file. Raises ModelError that begins with `where` if it has more than `max_bytes`."""
        if self.size > max_bytes:
            raise ModelError(f"{where}: {self.name} has {self.size} bytes, more than {max_bytes}")
        content = bytearray(self.size)
        if self.open().readinto(content) != self.size:  # type: ignore[attr-defined]
            raise ModelError(f"{where}: truncated: {self.name} extends beyond the end of the file")
        return bytes(content)


@dataclass(frozen=True)
class Archive:
    """The files of an open archive by their paths relative to its top."""

    path: Path
    members: Mapping[str, Member]

    @property
    def size(self) -> int:
        """Total size of all files in bytes."""
        return sum(member.size for member in self.members.values())

    def member(self, name: str) -> Member:
        """The file of that name. Raises ModelError if there is none."""
        if name not in self.members:
            raise ModelError(f"{self.path}: has no {name}; not a .nemo archive, or truncated")
        return self.members[name]

    def content(self, name: str, max_bytes: int) -> bytes:
        """All bytes of a small file. Raises ModelError if it is missing, or larger than `max_bytes`."""
        return self.member(name).content(max_bytes, str(self.path))

    def text(self, name: str, max_bytes: int) -> str:
        """The text of a small file. Raises ModelError as `content` does, and if it is not UTF-8."""
        try:
            return self.content(name, max_bytes).decode()
        except UnicodeDecodeError as error:
            raise ModelError(f"{self.path}: {name} is not text: {error}") from error


@contextmanager
def open_tar(path: Path, limits: Limits = DEFAULT_LIMITS) -> Iterator[Archive]:
    """Open an uncompressed tar. Raises ModelError that names the archive and the member.

    Links, devices, paths that escape the archive, duplicate names, members beyond the limits, and truncated
    files are refused.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such file; expected a .nemo archive")
    with path.open("rb") as file:
        if compression := _compression(path):
            raise ModelError(f"{path}: is a {compression} file; expected an uncompressed tar")
        yield Archive(path, _tar_members(path, file, limits))


@contextmanager
def open_archive(path: Path, scratch: Path, limits: Limits = DEFAULT_LIMITS) -> Iterator[Archive]:
    """Open a tar, plain or gzipped, or a folder. Raises ModelError as `open_tar` does.

    A compressed archive is first unpacked into an anonymous file in the folder `scratch`.
    """
    if path.is_dir():
        with ExitStack() as files:
            yield Archive(path, _folder_members(path, files, limits))
    elif path.is_file() and _compression(path) == "gzip":
        with _unpacked(path, scratch, limits) as file:
            yield Archive(path, _tar_members(path, file, limits))
    elif not path.exists():
        raise ModelError(f"{path}: no such file or folder; expected a .nemo archive or its files")
    else:
        with open_tar(path, limits) as archive:
            yield archive


def _compression(path: Path) -> str | None:
    """The name of a file's compression format; None if it is not compressed in a known one."""
    with path.open("rb") as file:
        magic = file.read(3)
    return _COMPRESSION.get(magic, _COMPRESSION.get(magic[:2]))


def _tar_members(path: Path, file: BinaryIO, limits: Limits) -> dict[str, Member]:
    size = file.seek(0, os.SEEK_END)
    members: dict[str, Member] = {}
    try:
        with tarfile.open(fileobj=FileWindow(file, 0, size), mode="r:") as tar:
            for count, entry in enumerate(tar):
                _require_few(path, count, limits)
                name = _path_inside(path, entry.name, entry.isdir(), limits)
                if entry.isdir():
                    continue
                if not entry.isreg() or entry.issparse():
                    raise ModelError(f"{path}: member {entry.name!r} is neither a plain file nor a folder")
                # The tar format can express negative sizes.
                if not 0 <= entry.size <= size - entry.offset_data:
                    raise ModelError(f"{path}: truncated: {entry.name!r} extends beyond the end of the file")
                if name in members:
                    raise ModelError(f"{path}: member {entry.name!r} occurs twice")
                members[name] = Member(name, file, entry.offset_data, entry.size)
    except ModelError:
        raise
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise ModelError(f"{path}: is not an uncompressed tar archive, or is truncated: {error}") from error
    return members


def _folder_members(folder: Path, files: ExitStack, limits: Limits) -> dict[str, Member]:
    members: dict[str, Member] = {}
    folders, count = [folder], 0
    while folders:
        for path in folders.pop().iterdir():
            _require_few(folder, count, limits)
            count += 1
            name = _path_inside(folder, path.relative_to(folder).as_posix(), path.is_dir(), limits)
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                raise ModelError(f"{path}: is neither a plain file nor a folder; copy the files themselves there")
            if path.is_dir():
                folders.append(path)
            else:
                members[name] = Member(name, cast(BinaryIO, _LazyFile(path, files)), 0, path.stat().st_size)
    return members


class _LazyFile:
    """A file that is opened on first use: a folder may have more files than a process can open at once."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._path, self._stack = path, stack
        self._file: BinaryIO | None = None

    def _opened(self) -> BinaryIO:
        if self._file is None:
            self._file = self._stack.enter_context(self._path.open("rb"))
        return self._file

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._opened().seek(offset, whence)

    def readinto(self, buffer: memoryview) -> int:
        return self._opened().readinto(buffer)  # type: ignore[attr-defined]


def _require_few(path: Path, count: int, limits: Limits) -> None:
    if count >= limits.members:
        raise ModelError(f"{path}: more than {limits.members} members")


def _path_inside(path: Path, name: str, folder: bool, limits: Limits) -> str:
    """A member's path relative to the top of the archive, normalized."""
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name or not (pure.parts or folder):
        raise ModelError(f"{path}: member {name!r} is outside of the archive")
    depth = len(pure.parts) + folder  # a folder counts like the files in it
    if depth > limits.depth:
        raise ModelError(f"{path}: member {name[:200]!r} is {depth} levels deep, more than {limits.depth}")
    return pure.as_posix()


@contextmanager
def _unpacked(path: Path, scratch: Path, limits: Limits) -> Iterator[BinaryIO]:
    """Unpack the tar in a gzip file to an anonymous file, which disappears with the process at the latest."""
    max_bytes = path.stat().st_size * limits.unpacked_ratio + limits.unpacked_slack
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=scratch) as plain:
        try:
            with gzip.open(path) as compressed:
                while block := compressed.read(_BLOCK):
                    if plain.tell() + len(block) > max_bytes:
                        raise ModelError(f"{path}: unpacks to more than {limits.unpacked_ratio} times its size")
                    if shutil.disk_usage(scratch).free < _SPARE_DISK + len(block):
                        raise ModelError(f"{path}: {scratch} has no space for the unpacked archive; free some space")
                    plain.write(block)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ModelError(f"{path}: is truncated, or not a gzip file: {error}") from error
        plain.flush()
        yield cast(BinaryIO, plain)
