"""Reads metric points from the local copy of a job's journal."""

import threading
from pathlib import Path

from fedsft_assets.federation.protocol.journal import EntryError, from_line
from fedsft_assets.federation.protocol.points import Point
from fedsft_assets.federation.protocol.tail import Tail


class JournalPoints:
    """The points in the file `journal`, which another process may be appending to, without duplicates.

    Points stay available after the file is removed. Thread-safe; each thread keeps its own offset.
    """

    def __init__(self, journal: Path) -> None:
        self._tail = Tail(journal)
        self._lock = threading.Lock()
        self._points: list[Point] = []
        self._known: set[tuple[object, ...]] = set()

    def read(self, offset: int = 0) -> list[Point]:
        """All points from index `offset` on, in the journal's order; none if the file does not exist.

        Raises OSError.
        """
        with self._lock:
            for line in self._tail.new_lines():
                try:
                    entry = from_line(line)
                except EntryError:
                    continue  # from another version of this package
                if isinstance(entry, Point) and entry.identity not in self._known:
                    self._known.add(entry.identity)
                    self._points.append(entry)
            return self._points[offset:]
