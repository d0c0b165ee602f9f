"""What becomes of memory that a pass through the model has freed."""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

# Parameters of mallopt(3), from malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER_TRIM, _NO_MAPPINGS = -1, 0


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within the block, freed memory stays with the process; at its end, all of it goes back to the system.

    Each step frees what the next one asks for again. By default glibc gives large blocks back at once, and the
    system must clear them page by page: up to a tenth of a small model's step. With another C library, nothing happens.
    """
    library = _glibc()
    if library is None:
        yield
        return
    library.mallopt(_TRIM_THRESHOLD, _NEVER_TRIM)
    library.mallopt(_MMAP_MAX, _NO_MAPPINGS)
    try:
        yield
    finally:
        give_back_freed_memory()


def give_back_freed_memory() -> None:
    """Let the system have what lies free, also between things that are in use."""
    if library := _glibc():
        library.malloc_trim(0)


@cache
def _glibc() -> Any | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "gnu_get_libc_version") else None
