"""What is done about faults after their time: frozen processes go on, participants are started again."""

import contextlib
import time
from collections.abc import Callable

import psutil

from fedsft_assets_tests.faults.systems import System


class Repairs:
    """Done when they are due, by whoever calls `run`; `is_open` while some are left."""

    def __init__(self, system: System) -> None:
        self._system = system
        self._due: list[tuple[float, Callable[[], bool]]] = []

    @property
    def is_open(self) -> bool:
        return bool(self._due)

    def thaw(self, processes: list[psutil.Process], seconds: float) -> None:
        """Have processes go on after so many seconds."""

        def repair() -> bool:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()
            return True

        self._due.append((time.monotonic() + seconds, repair))

    def start(self, participant: str, seconds: float) -> None:
        """Have a participant start after so many seconds."""
        self._due.append((time.monotonic() + seconds, lambda: self._system.start_again(participant)))

    def run(self, all_at_once: bool = False) -> None:
        """What is due; or all of it, however early."""
        now = time.monotonic()
        ready = [one for one in self._due if all_at_once or one[0] <= now]
        self._due = [one for one in self._due if one not in ready]
        for _, repair in ready:
            if not repair():
                self._due.append((now + 1.0, repair))
