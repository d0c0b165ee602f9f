"""One-line explanations of errors caused by a full disk or an unwritable home."""

import errno
import logging
import os
import re
import select
import shutil
import sqlite3
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_FULL_TEXT = re.compile(r"No space left on device|Disk quota exceeded|database or disk is full")
_FORBIDDEN_TEXT = re.compile(r"attempt to write a readonly database|unable to open database file")
# SQLite uses this for many errors; it counts only if the disk is nearly full.
_PERHAPS_FULL_TEXT = re.compile(r"disk I/O error")
_NO_ROOM = 1 << 20  # bytes
_MB = 1_000_000
_STDERR = 2
_PIECE = 1 << 16
_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_HELD = 1.0  # a stack trace precedes its error message
_SECONDS_DROPPED = 10.0

_log = logging.getLogger(__name__)


def explain(error: BaseException, home: Path) -> str | None:
    """A one-line explanation if the error or a cause of it is a full disk or an unwritable home; otherwise None."""
    for cause in _chain(error):
        if isinstance(cause, OSError):
            path = Path(os.fsdecode(cause.filename)) if isinstance(cause.filename, str | bytes) else home
            if cause.errno in _FULL:
                return _full(path, home)
            if cause.errno in _FORBIDDEN and (path.is_relative_to(home) or home.is_relative_to(path)):
                return _forbidden(path, home, os.strerror(cause.errno))
        # Only database errors: other errors are more specific than this text.
        if isinstance(cause, sqlite3.Error) and (text := explain_text(str(cause), home)):
            return text
    return None


def explain_text(text: str, home: Path) -> str | None:
    """Like `explain`, for the text of an error."""
    if _says_full(text, home):
        return _full(home, home)
    if match := _FORBIDDEN_TEXT.search(text):
        return _forbidden(home, home, match.group())
    return None


@contextmanager
def one_line_when_full(home: Path) -> Iterator[None]:
    """Filter standard error of this process and its children in the block, with a delay of one second.

    On a full disk, every component writes pages of errors; these are dropped. If the block succeeds all the same, one
    line is logged.
    """
    own = os.dup(_STDERR)
    reading, writing = os.pipe()
    os.dup2(writing, _STDERR)
    os.close(writing)
    done = threading.Event()
    held = _FilteredStream(home, own)
    thread = threading.Thread(target=held.pass_on, args=(reading, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(own, _STDERR)
        done.set()
        thread.join()
        os.close(reading)
        os.close(own)
    if held.was_full:
        _log.warning(_full(home, home))


class _FilteredStream:
    """Delays and filters standard error."""

    def __init__(self, home: Path, into: int) -> None:
        self._home, self._into = home, into
        self._waiting: deque[tuple[float, bytes]] = deque()
        self._drop_until = 0.0
        self.was_full = False

    def pass_on(self, reading: int, done: threading.Event) -> None:
        while True:
            ready, _, _ = select.select([reading], [], [], _SECONDS_BETWEEN_LOOKS)
            if ready and (piece := os.read(reading, _PIECE)):
                self._take(piece)
            elif ready or done.is_set():
                break
            while self._waiting and self._waiting[0][0] < time.monotonic() - _SECONDS_HELD:
                os.write(self._into, self._waiting.popleft()[1])
        for _, piece in self._waiting:
            os.write(self._into, piece)

    def _take(self, piece: bytes) -> None:
        now = time.monotonic()
        self._waiting.append((now, piece))
        if _says_full(b"".join(held for _, held in self._waiting).decode(errors="replace"), self._home):
            self.was_full, self._drop_until = True, now + _SECONDS_DROPPED
        if now < self._drop_until:
            self._waiting.clear()


def _says_full(text: str, home: Path) -> bool:
    return bool(_FULL_TEXT.search(text) or (_PERHAPS_FULL_TEXT.search(text) and _free(home) < _NO_ROOM))


def _full(path: Path, home: Path) -> str:
    return (
        f"{path}: no space left on its disk ({_free(home) / _MB:,.1f} MB free in {home}); free some space and run it"
        " again: finished work is kept, and it resumes from there"
    )


def _forbidden(path: Path, home: Path, why: str) -> str:
    return (
        f"{path}: user {os.geteuid()} cannot write there: {why} ({_free(home) / _MB:,.1f} MB free in {home}); let this"
        " user write there, or set FEDSFT_HOME to a folder where it can"
    )


def _free(home: Path) -> int:
    """Free bytes for this user at the path of a home, which need not exist yet."""
    for folder in (home, *home.parents):
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            continue
    return 0


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop(0)
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [one.__cause__, one.__context__]
