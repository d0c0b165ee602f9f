"""A disk that is soon full: a small file system of its own, for tests."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

_PIECE = 1 << 16


def why_not() -> str | None:
    """Why no file system can be mounted here, or None."""
    if os.geteuid() != 0:
        return "mounting a small disk needs root"
    probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        tried = subprocess.run(probe, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        return f"mounting a small disk needs the command {error.filename}"
    return f"no small disk can be mounted here: {tried.stderr.strip()}" if tried.returncode else None


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """The folder, which is made, is a disk of that size as long as the block takes."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(file: Path) -> None:
    """Make the file as big as its disk allows; nothing more can be written there until it is removed."""
    with file.open("wb", buffering=0) as ballast:
        for piece in (_PIECE, 1):
            with contextlib.suppress(OSError):
                while True:
                    ballast.write(bytes(piece))
