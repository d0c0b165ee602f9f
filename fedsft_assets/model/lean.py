"""Importing transformers without what training and generation never use."""

import functools
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Metrics of its Trainer and losses of object detection: a second of a trainer's start.
_NOT_NEEDED = ("scipy", "sklearn")
# It reads the source of all models, and does so twice, because transformers keeps fewer of its results than there are.
_TOO_LITTLE_KEPT = "create_import_structure_from_path"
_standard_lru_cache = functools.lru_cache


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
    functools.lru_cache = _lru_cache
    try:
        yield
    finally:
        functools.lru_cache = _standard_lru_cache
        for name in hidden:
            del sys.modules[name]
        if collecting:
            gc.enable()


def _lru_cache(maxsize: Callable[..., Any] | int | None = 128, typed: bool = False) -> Any:
    """The standard library's, with room for all results of the one function."""
    if callable(maxsize) and maxsize.__name__ == _TOO_LITTLE_KEPT:
        return _standard_lru_cache(maxsize=None)(maxsize)
    return _standard_lru_cache(maxsize, typed)
