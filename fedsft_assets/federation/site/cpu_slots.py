"""Turns of the trainers on one machine: where it plays more sites than it has cores, only some compute at once."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

TURNS = "FEDSFT_TURNS"  # names a folder with one file for each trainer that may compute; without it, all may

_SECONDS_BETWEEN_TRIES = 0.05
_SECONDS_BETWEEN_WORDS = 60.0


def make_turns(folder: Path, at_once: int) -> None:
    """Let so many trainers compute at once, of those that find the folder in their environment."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(at_once):
        (folder / str(number)).touch()


@contextmanager
def turn(waiting: Callable[[], object]) -> Iterator[None]:
    """Wait for a turn, and have it for the block; a process that dies loses its own.

    `waiting` is called once a minute, for those who take silence for a sign of death.
    """
    folder = os.environ.get(TURNS)
    if folder is None:
        yield
        return
    last = time.monotonic()
    files = [path.open("wb") for path in sorted(Path(folder).iterdir())]
    try:
        while not any(_taken(file.fileno()) for file in files):
            time.sleep(_SECONDS_BETWEEN_TRIES)
            if time.monotonic() - last > _SECONDS_BETWEEN_WORDS:
                last = time.monotonic()
                waiting()
        yield
    finally:
        for file in files:
            file.close()  # which gives the lock back


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
