"""Where tensors lie that have arrived: in memory or in files, which the next ones use again.

Memory that is asked for anew costs more than copying, on most machines, and so do pages of a new file. It needs torch
only.
"""

from __future__ import annotations

import itertools
import mmap
import sys
import weakref
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch

_ONLY_HERE = 2  # references to an object, while `sys.getrefcount` looks, that one name stands for

_memory: mmap.mmap | None = None  # the last block


def memory_block(size: int) -> torch.Tensor:
    """So many bytes from the system itself, those of the last block if nobody has a tensor in it any more."""
    global _memory  # noqa: PLW0603
    if size == 0:
        return torch.empty(0, dtype=torch.uint8)
    if _memory is None or len(_memory) < size or sys.getrefcount(_memory) > _ONLY_HERE:
        _memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            _memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(_memory, dtype=torch.uint8, count=size)


class ReusedFiles:
    """Files of a folder, each written over and over: the memory that stands for its content is then there already."""

    def __init__(self, folder: Path, at_most: int | None = None) -> None:
        """`at_most` so many bytes may be written into one, by whoever takes it."""
        self.folder, self.at_most, self._count = folder, at_most, itertools.count()
        self._free: list[Path] = []

    def take(self) -> ReusedFile:
        """One that nobody has, by its name; it is free again when nobody has what is returned."""
        try:
            path = self._free.pop()
        except IndexError:
            path = self.folder / f"{next(self._count)}"
        file = ReusedFile(path)
        weakref.finalize(file, self._free.append, path)
        return file


@dataclass(eq=False)
class ReusedFile:
    path: Path


class StoredTensor:
    """A tensor that lies in a file; `materialize` gives it without taking memory for it."""

    def __init__(self, file: ReusedFile, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self._file, self._offset = file, offset
        self.dtype, self.shape = dtype, shape

    def materialize(self) -> torch.Tensor:
        """The tensor, whose pages are those of the file; what is changed in it stays with the caller."""
        size = prod(self.shape) * self.dtype.itemsize
        if size == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        content = np.memmap(self._file.path, dtype=np.uint8, mode="c", offset=self._offset, shape=(size,))
        content.file = self._file  # type: ignore[attr-defined]  # nobody writes into it as long as the tensor is there
        return torch.from_numpy(content).view(self.dtype).reshape(self.shape)
