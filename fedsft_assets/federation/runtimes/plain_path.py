"""Short-lived names without special characters for folders whose paths have some.

NVFlare puts paths into command lines that are split at spaces and quotes, and `PATH` is split at colons. There a
folder is named by a private link in a place for temporary files.
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
_PLACES = ("/tmp", "/var/tmp", "/dev/shm")
_LINK = "folder"


def is_plain(path: Path) -> bool:
    """Whether the path means itself in a command line, and in a variable like `PATH`."""
    return shlex.quote(str(path)) == str(path) and os.pathsep not in str(path)


@contextmanager
def plain_path(folder: Path) -> Iterator[Path]:
    """The folder's path if it is plain, else that of a link to it, as long as the block takes.

    Links of processes that were killed are removed by the next call. Raises OSError where no link can be made.
    """
    if is_plain(folder):
        yield folder
        return
    place = _place()
    _remove_left(place)
    with _own_folder(place) as private:
        link = private / _LINK
        link.symlink_to(folder)
        yield link


def _place() -> Path:
    for place in map(Path, (tempfile.gettempdir(), *_PLACES)):
        if is_plain(place) and os.access(place, os.W_OK | os.X_OK):
            return place
    raise OSError(f"none of {', '.join(_PLACES)} can be written to; set TMPDIR to a folder with a plain path")


@contextmanager
def _own_folder(place: Path) -> Iterator[Path]:
    """A new folder for this user only, locked until it is removed, so that others know that it is in use."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another call took it for left behind before it was locked
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if not folder.exists():
                continue
            yield folder
            return
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(handle)


def _remove_left(place: Path) -> None:
    """Remove what processes of this user left that died."""
    for left in place.glob(f"{_PREFIX}*"):
        try:
            handle = os.open(left, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            continue  # just gone, or another user's
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        except BlockingIOError:
            pass  # in use
        finally:
            os.close(handle)
