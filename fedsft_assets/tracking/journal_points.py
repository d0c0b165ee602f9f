"""The points of a job's curves, as this side's copy of the server's journal has them."""

import threading
from pathlib import Path

from fedsft_assets.federation.protocol.journal import EntryError, from_line
from fedsft_assets.federation.protocol.points import Point
from fedsft_assets.federation.protocol.tail import Tail


class JournalPoints:
    """The points in the file `journal`, which another process may be writing, each identity once.

    What was read stays known when the file goes. Several threads may read, each with an offset of its own.
    """

    def __init__(self, journal: Path) -> None:
        self._tail = Tail(journal)
        self._lock = threading.Lock()
        self._points: list[Point] = []
        self._known: set[tuple[object, ...]] = set()

    def read(self, offset: int = 0) -> list[Point]:
        """All points but the first `offset` ones, in the journal's order; none of a file that is not there.

        Raises OSError.
        """
        with self._lock:
            for line in self._tail.new_lines():
                try:
                    entry = from_line(line)
                except EntryError:
                    continue  # of another version of this package
                if isinstance(entry, Point) and entry.identity not in self._known:
                    self._known.add(entry.identity)
                    self._points.append(entry)
            return self._points[offset:]
