"""What becomes of memory that a process has freed, with glibc's allocator; with another C library, nothing happens.

Left alone, glibc gives large blocks back to the system at once, which must clear them page by page when they are asked
for again: for trainers that costs up to a tenth of a small model's step, for processes that send and receive models
more than all copying. And each of its many arenas keeps some for itself.
"""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

# Parameters of mallopt(3), from malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8
_NEVER_TRIM, _NO_MAPPINGS = -1, 0
_ARENAS, _OWN_PAGES, _KEPT = 1, 32 << 20, 64 << 20  # larger blocks have pages of their own; the heap keeps so much

MESSAGE_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": str(_ARENAS),
    "MALLOC_MMAP_THRESHOLD_": str(_OWN_PAGES),
    "MALLOC_TRIM_THRESHOLD_": str(_KEPT),
}
"""As `keep_message_memory`, for processes that are still to be started, which only then have no arenas yet."""


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within the block, freed memory stays with the process; at its end, all of it goes back to the system.

    For trainers, whose steps free what the next one asks for again.
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


def keep_message_memory() -> None:
    """From now on, the memory that a message was in is used again by the next one."""
    if library := _glibc():
        library.mallopt(_ARENA_MAX, _ARENAS)
        library.mallopt(_MMAP_THRESHOLD, _OWN_PAGES)
        library.mallopt(_TRIM_THRESHOLD, _KEPT)


def collect_messages() -> None:
    """Let go of messages that are over: NVFlare's are in reference cycles, which only the garbage collector ends."""
    gc.collect()


@cache
def _glibc() -> Any | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "gnu_get_libc_version") else None
