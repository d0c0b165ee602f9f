"""CPU slots for the trainers on one machine: with more simulated sites than cores, only some compute at once."""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

TURNS = "FEDSFT_TURNS"  # a folder with one file per slot; if unset, there is no limit

_SECONDS_BETWEEN_TRIES = 0.05
_SECONDS_BETWEEN_CALLS = 60.0


def make_turns(folder: Path, at_once: int) -> None:
    """Create `at_once` slots for the trainers whose environment names the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(at_once):
        (folder / str(number)).touch()


@contextmanager
def turn(waiting: Callable[[], object]) -> Iterator[None]:
    """Wait for a free slot and hold it for the block; a dead process releases its slot.

    `waiting` is called once a minute, as a sign of life.
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
            if time.monotonic() - last > _SECONDS_BETWEEN_CALLS:
                last = time.monotonic()
                waiting()
        yield
    finally:
        for file in files:
            file.close()  # releases the lock


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
