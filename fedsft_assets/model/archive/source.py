"""Where a Megatron archive's files are: a `.nemo` tar, plain or compressed by gzip, or a folder of its files.

Files are read in place; nothing is extracted under a name that the archive chooses. Archives may come
from anyone.
"""

import gzip
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
from fedsft_assets.model.archive.nemo_archive import CONFIG
from fedsft_assets.model.errors import ModelError

_MOST_MEMBERS = 10_000
_DEEPEST = 8
_GZIP = b"\x1f\x8b"
_OTHER_COMPRESSION = {b"BZh": "bzip2", b"\xfd7z": "xz", b"PK\3": "zip", b"\x28\xb5\x2f": "zstandard"}
# A bomb is a thousand times its compressed size; weights are rarely more than twice.
_LARGEST_RATIO = 20
_SLACK = 64 << 20
_SPARE_DISK = 1 << 30
_BLOCK = 8 << 20


@dataclass(frozen=True)
class Member:
    """One file of an archive: its bytes are `size` ones from `start` in `file`."""

    name: str
    file: BinaryIO
    start: int
    size: int

    def open(self, offset: int = 0, size: int | None = None) -> BinaryIO:
        """The file, or a part of it; the caller has checked that the part lies in it."""
        window = FileWindow(self.file, self.start + offset, self.size - offset if size is None else size)
        return cast(BinaryIO, window)


@dataclass(frozen=True)
class MegatronSource:
    """The files of an archive by their names relative to its top, open until the block of `open_source` ends."""

    path: Path
    members: Mapping[str, Member]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(member.size for member in self.members.values())

    def content(self, name: str, most: int) -> bytes:
        """A small file whole. Raises ModelError if it is not there, or is larger than `most` bytes."""
        member = self.members.get(name)
        if member is None:
            raise ModelError(f"{self.path}: has no {name}; not a .nemo archive, or truncated")
        if member.size > most:
            raise ModelError(f"{self.path}: {name} has {member.size} bytes, more than {most}")
        content = bytearray(member.size)
        if member.open().readinto(content) != member.size:  # type: ignore[attr-defined]
            raise ModelError(f"{self.path}: truncated: {name} ends after the file does")
        return bytes(content)

    def text(self, name: str, most: int) -> str:
        try:
            return self.content(name, most).decode()
        except UnicodeDecodeError as error:
            raise ModelError(f"{self.path}: {name} is not text: {error}") from error


@contextmanager
def open_source(path: Path, scratch: Path) -> Iterator[MegatronSource]:
    """Open an archive or a folder. A compressed archive is first unpacked into a nameless file in `scratch`.

    Raises ModelError that names the archive and the member: not plain files, outside of the archive,
    too many, too large, truncated, or of a format that is not read.
    """
    with ExitStack() as stack:
        if path.is_dir():
            members = _folder(path, stack)
        elif path.is_file():
            file: BinaryIO = stack.enter_context(path.open("rb"))
            magic = file.read(3)
            if magic[:2] == _GZIP:
                file = stack.enter_context(_unpacked(path, scratch))
            elif magic in _OTHER_COMPRESSION:
                raise ModelError(f"{path}: is a {_OTHER_COMPRESSION[magic]} file; expected a tar, plain or of gzip")
            members = _tar(path, file)
        else:
            raise ModelError(f"{path}: no such file or folder; expected a .nemo archive or its files")
        if CONFIG not in members:
            raise ModelError(f"{path}: has no {CONFIG}; not a .nemo archive of NeMo 1, or truncated")
        yield MegatronSource(path, members)


def _tar(path: Path, file: BinaryIO) -> dict[str, Member]:
    size = file.seek(0, 2)
    members: dict[str, Member] = {}
    try:
        with tarfile.open(fileobj=FileWindow(file, 0, size), mode="r:") as tar:
            for count, entry in enumerate(tar):
                name = _name(path, entry.name)
                if count >= _MOST_MEMBERS:
                    raise ModelError(f"{path}: more than {_MOST_MEMBERS} members")
                if entry.isdir():
                    continue
                if not entry.isreg() or entry.issparse():
                    raise ModelError(f"{path}: member {entry.name!r} is neither a plain file nor a folder")
                if entry.offset_data + entry.size > size:
                    raise ModelError(f"{path}: truncated: {entry.name!r} ends after the file does")
                _add(path, members, Member(name, file, entry.offset_data, entry.size))
    except (tarfile.TarError, EOFError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path}: is no tar archive, or is truncated: {error}") from error
    return members


def _folder(path: Path, stack: ExitStack) -> dict[str, Member]:
    members: dict[str, Member] = {}
    left = [path]
    while left:
        for place in left.pop().iterdir():
            name = _name(path, place.relative_to(path).as_posix())
            if place.is_symlink() or not (place.is_dir() or place.is_file()):
                raise ModelError(f"{place}: is neither a plain file nor a folder; copy the files themselves there")
            if place.is_dir():
                left.append(place)
            else:
                # The name alone now: a folder may have more files than may be open.
                _add(path, members, Member(name, cast(BinaryIO, _Lazily(place, stack)), 0, place.stat().st_size))
    return members


class _Lazily:
    """A file that is opened when it is first read."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._path, self._stack = path, stack
        self._file: BinaryIO | None = None

    def _opened(self) -> BinaryIO:
        if self._file is None:
            self._file = self._stack.enter_context(self._path.open("rb"))
        return self._file

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._opened().seek(offset, whence)

    def readinto(self, buffer: memoryview) -> int:
        return self._opened().readinto(buffer)  # type: ignore[attr-defined]


def _name(path: Path, name: str) -> str:
    pure = PurePosixPath(name)
    if pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name:
        raise ModelError(f"{path}: member {name!r} is outside of the archive")
    if pure.name == ".zarray":
        raise ModelError(
            f"{path}: {pure.parent}: the weights are in the zarr format, which is not read; load the checkpoint with"
            " the NeMo that wrote it, set dist_ckpt_format: torch_dist, and save it anew"
        )
    if len(pure.parts) > _DEEPEST:
        raise ModelError(f"{path}: member {name[:200]!r} is more than {_DEEPEST} folders deep")
    return pure.as_posix()


def _add(path: Path, members: dict[str, Member], member: Member) -> None:
    if member.name in members:
        raise ModelError(f"{path}: member {member.name!r} is there twice")
    if len(members) >= _MOST_MEMBERS:
        raise ModelError(f"{path}: more than {_MOST_MEMBERS} members")
    members[member.name] = member


@contextmanager
def _unpacked(path: Path, scratch: Path) -> Iterator[BinaryIO]:
    """The tar inside a gzip file, in a file that vanishes with the process at the latest."""
    most = path.stat().st_size * _LARGEST_RATIO + _SLACK
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=scratch) as plain:
        try:
            with gzip.open(path) as packed:
                while block := packed.read(_BLOCK):
                    if plain.tell() + len(block) > most:
                        raise ModelError(f"{path}: unpacks to more than {_LARGEST_RATIO} times its size")
                    if shutil.disk_usage(scratch).free < _SPARE_DISK + len(block):
                        raise ModelError(f"{path}: {scratch} has no space for the unpacked archive; free some")
                    plain.write(block)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ModelError(f"{path}: is truncated, or no gzip file: {error}") from error
        plain.flush()
        yield cast(BinaryIO, plain)
