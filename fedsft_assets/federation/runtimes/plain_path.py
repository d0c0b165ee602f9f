"""Temporary links for folders whose paths contain special characters.

NVFlare puts paths into command lines that are split at spaces and quotes, and `PATH` is split at colons. Such a folder
is passed as a private symbolic link in a folder for temporary files.
"""

import fcntl
import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PREFIX = f"fedsft-link-{os.getuid()}-"
_TEMPORARY_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
_LINK = "folder"


def is_plain(path: Path) -> bool:
    """Whether the path needs no quoting in a command line or in a variable like `PATH`."""
    return shlex.quote(str(path)) == str(path) and os.pathsep not in str(path)


@contextmanager
def plain_path(folder: Path) -> Iterator[Path]:
    """The folder's own path if it is plain, else a link to it that exists until the block ends.

    Links of killed processes are removed by the next call. Raises OSError if no link can be made.
    """
    if is_plain(folder):
        yield folder
        return
    parent = _temporary_folder()
    _remove_stale(parent)
    with _private_folder(parent) as private:
        link = private / _LINK
        link.symlink_to(folder)
        yield link


def _temporary_folder() -> Path:
    for folder in map(Path, (tempfile.gettempdir(), *_TEMPORARY_FOLDERS)):
        if is_plain(folder) and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise OSError(
        f"none of {', '.join(_TEMPORARY_FOLDERS)} is writable; set TMPDIR to a writable folder whose path has no spaces"
        " or special characters"
    )


@contextmanager
def _private_folder(parent: Path) -> Iterator[Path]:
    """A new folder for this user only; it is locked while it is in use, and removed afterwards."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another call removed it as stale before it was locked
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if not folder.exists():
                continue
            yield folder
            return
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)


def _remove_stale(parent: Path) -> None:
    """Remove the links of this user's processes that died."""
    for stale in parent.glob(f"{_PREFIX}*"):
        try:
            handle = os.open(stale, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            continue  # removed meanwhile, or another user's
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(stale, ignore_errors=True)
        except BlockingIOError:
            pass  # in use
        finally:
            os.close(handle)
