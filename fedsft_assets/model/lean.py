"""Importing transformers without what training and generation never use."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Metrics of its Trainer and losses of object detection: a second of a trainer's start.
_NOT_NEEDED = ("scipy", "sklearn")


@contextmanager
def lean_imports() -> Iterator[None]:
    """Within the block, packages that are installed but not needed are not found, unless they are loaded already.

    The garbage collector waits: what modules make while they load stays for good.
    """
    hidden = [name for name in _NOT_NEEDED if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # how Python remembers a package that is not there
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
        if collecting:
            gc.enable()
