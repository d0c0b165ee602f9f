"""A part of a file as a read-only file, for reading archive members in place, without extraction."""

import io
import os
from typing import Any, BinaryIO


class FileWindow(io.RawIOBase):
    """The `size` bytes of an open file that begin at `start`.

    `read` raises ValueError for more than `max_read` bytes, since header parsers request as many as an untrusted
    file says. `readinto` has no limit: its caller has already allocated the memory.
    """

    def __init__(self, file: BinaryIO, start: int, size: int, max_read: int = 1 << 20) -> None:
        self._file, self._start, self._size, self._max_read, self._position = file, start, size, max_read, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if position < 0:
            raise ValueError(f"position {position} is before the beginning")
        self._position = position
        return position

    def read(self, size: int = -1) -> bytes:
        remaining = max(self._size - self._position, 0)
        size = remaining if size < 0 else min(size, remaining)
        if size > self._max_read:
            raise ValueError(f"{size} bytes at once are more than {self._max_read}")
        return super().read(size) or b""

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        target = target[: max(self._size - self._position, 0)]
        self._file.seek(self._start + self._position)
        count = 0
        while count < len(target) and (more := self._file.readinto(target[count:])):  # type: ignore[attr-defined]
            count += more
        self._position += count
        return count
