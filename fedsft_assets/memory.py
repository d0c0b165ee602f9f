"""Tunes how glibc's allocator handles freed memory; no effect with other C libraries.

By default, glibc returns large blocks to the system at once, which must zero their pages when they are allocated again:
this costs trainers up to a tenth of a small model's step, and processes that send and receive models more than all
copying. Each of its many arenas also keeps some free memory.
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
_ARENAS, _OWN_PAGES, _KEPT = 1, 32 << 20, 64 << 20  # bytes: larger blocks are mapped separately; free heap to keep

MESSAGE_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": str(_ARENAS),
    "MALLOC_MMAP_THRESHOLD_": str(_OWN_PAGES),
    "MALLOC_TRIM_THRESHOLD_": str(_KEPT),
}
"""Like `keep_message_memory`, but for child processes, before they create any arenas."""


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within the block, freed memory stays with the process; afterwards it is returned to the system.

    For trainers, whose steps free what the next step allocates again.
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
    """Return free memory to the system, including gaps between blocks in use."""
    if library := _glibc():
        library.malloc_trim(0)


def keep_message_memory() -> None:
    """Reuse the memory of a message for the next one, from now on."""
    if library := _glibc():
        library.mallopt(_ARENA_MAX, _ARENAS)
        library.mallopt(_MMAP_THRESHOLD, _OWN_PAGES)
        library.mallopt(_TRIM_THRESHOLD, _KEPT)


def collect_messages() -> None:
    """Free finished messages: NVFlare's are in reference cycles, which only the garbage collector breaks."""
    gc.collect()


@cache
def _glibc() -> Any | None:
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "gnu_get_libc_version") else None
