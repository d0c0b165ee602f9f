"""Lines of progress for work that is counted in bytes."""

from collections.abc import Callable

_SAY_EVERY = 1 << 30


class ByteProgress:
    """Says, once for each gigabyte, how far it is to `total` bytes, and what was `done` with them."""

    def __init__(self, total: int, done: str, say: Callable[[str], object]) -> None:
        self._total, self._done, self._say, self._bytes = total, done, say, 0

    def add(self, count: int) -> None:
        before, self._bytes = self._bytes, self._bytes + count
        if self._bytes // _SAY_EVERY > before // _SAY_EVERY:
            self._say(f"{self._bytes / self._total:.0%} of {self._total / 1e9:.1f} GB {self._done}")
