"""What becomes of the memory of messages, in processes that send and receive models.

Memory that a message was in is used again by the next one. Left alone, the allocator of the C library glibc gives it
back to the system, which must clear it anew for each message: that costs more than all copying. And each of its many
arenas keeps some for itself.
"""

import ctypes
import gc

_ARENAS, _OWN_PAGES, _KEPT = 1, 32 << 20, 64 << 20  # larger blocks have pages of their own; the heap keeps so much
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of malloc.h

# For the environment of processes that are still to be started, which only then have no arenas yet.
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": str(_ARENAS),
    "MALLOC_MMAP_THRESHOLD_": str(_OWN_PAGES),
    "MALLOC_TRIM_THRESHOLD_": str(_KEPT),
}


def keep_freed_memory() -> None:
    """The same for this process. Nothing happens where the C library is not glibc."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(_M_ARENA_MAX, _ARENAS)
        mallopt(_M_MMAP_THRESHOLD, _OWN_PAGES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT)


def collect_messages() -> None:
    """Let go of messages that are over: NVFlare's go round in circles, so that Python's counts never reach zero."""
    gc.collect()
