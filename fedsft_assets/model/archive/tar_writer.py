"""Sequential tar writer for members whose sizes are known only after they are written."""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fedsft_assets.files import publish_file


@contextmanager
def new_tar(path: Path) -> Iterator[BinaryIO]:
    """Yield a new tar for `tar_member` and `tar_folder`; it is published as `path` when the block ends, atomically."""
    with publish_file(path) as fresh, fresh.open("w+b") as file:
        yield file
        file.write(b"\0" * (2 * tarfile.BLOCKSIZE))


@contextmanager
def tar_member(file: BinaryIO, name: str) -> Iterator[None]:
    """Make what the block writes a member of the tar; its header is written last, when its size is known."""
    start = file.tell()
    file.write(b"\0" * tarfile.BLOCKSIZE)
    yield
    end = file.tell()
    entry = tarfile.TarInfo(name)
    entry.size = end - start - tarfile.BLOCKSIZE
    file.seek(start)
    file.write(entry.tobuf(tarfile.GNU_FORMAT))
    file.seek(end)
    file.write(b"\0" * (-entry.size % tarfile.BLOCKSIZE))


def tar_folder(file: BinaryIO, name: str) -> None:
    """Append a folder entry."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode = tarfile.DIRTYPE, 0o755
    file.write(entry.tobuf(tarfile.GNU_FORMAT))
