"""Reusable buffers for received tensors, in memory or in files.

On most machines, allocating memory or file pages costs more than copying into them. Requires torch only.
"""

from __future__ import annotations

import itertools
import mmap
import shutil
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch

_UNSHARED = 2  # `sys.getrefcount` of an object with one other reference


class ReusedMemory:
    """A memory block for the tensors of one message, reused once no tensor of the last message is alive."""

    def __init__(self) -> None:
        self._block: mmap.mmap | None = None

    def take(self, size: int) -> torch.Tensor:
        """A uint8 tensor of `size` bytes: in the last block if it is large enough and free, otherwise in a new one."""
        if size == 0:
            return torch.empty(0, dtype=torch.uint8)
        if self._block is None or len(self._block) < size or sys.getrefcount(self._block) > _UNSHARED:
            self._block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                self._block.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(self._block, dtype=torch.uint8, count=size)


class ReusedFiles:
    """Files in a folder that are overwritten by successive messages, so that their pages are already in memory."""

    def __init__(self, folder: Path, max_bytes: int | None = None) -> None:
        """Messages with more than `max_bytes` of tensors are rejected; None means no limit."""
        self.folder, self.max_bytes, self._count = folder, max_bytes, itertools.count()
        self._free: list[Path] = []

    def take(self) -> ReusedFile:
        """A free file; it is freed again when the returned object is garbage-collected."""
        try:
            path = self._free.pop()
        except IndexError:
            path = self.folder / f"{next(self._count)}"
        file = ReusedFile(path)
        weakref.finalize(file, self._free.append, path)
        return file


@contextmanager
def temporary_files(folder: Path, max_bytes: int | None = None) -> Iterator[ReusedFiles]:
    """Reusable files in a fresh folder that is removed at the end."""
    shutil.rmtree(folder, ignore_errors=True)  # left by a process that was killed
    folder.mkdir()
    try:
        yield ReusedFiles(folder, max_bytes)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(eq=False)
class ReusedFile:
    path: Path


class StoredTensor:
    """A tensor in a file."""

    def __init__(self, file: ReusedFile, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self._file, self._offset = file, offset
        self.dtype, self.shape = dtype, shape

    def materialize(self) -> torch.Tensor:
        """The tensor, memory-mapped from the file; changes to it are not written back."""
        size = prod(self.shape) * self.dtype.itemsize
        if size == 0:
            return torch.empty(self.shape, dtype=self.dtype)
        content = np.memmap(self._file.path, dtype=np.uint8, mode="c", offset=self._offset, shape=(size,))
        content.file = self._file  # type: ignore[attr-defined]  # the file is not overwritten while the tensor exists
        return torch.from_numpy(content).view(self.dtype).reshape(self.shape)
