"""Sending side: a message's tensors as one byte stream, in pieces that receivers request in order.

A piece is a view of the tensors' own memory if possible.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from nvflare.fuel.f3.streaming.download_service import Downloadable, ProduceRC

from fedsft_assets.federation.transport.header import MAX_GAP, MAX_PIECE, StreamHeader, TensorHeader, flat_bytes
from fedsft_assets.federation.transport.tensors import BlockTensor, Delta, LazyTensor, MemoryBlock
from fedsft_assets.memory import collect_messages

_MAX_UNCOLLECTED = 20 << 20  # bytes allocated for sending that may stay uncollected after they are sent
_UNCOPIED_PIECE = 1 << 20  # bytes that NVFlare allocates to send a piece without copying it
_POSITION = "at"


class TensorStream(Downloadable):
    """The tensors of one message. Each receiver requests pieces by byte position."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], piece_size: int) -> None:
        self.base_obj: dict[str, torch.Tensor] | None = dict(tensors)
        super().__init__(self.base_obj)
        self._allocated = 0  # bytes since the last collection
        self._header = _header_of(tensors, piece_size)
        self._allocated_by_view = _UNCOPIED_PIECE if piece_size == MAX_PIECE else piece_size
        self._tensors = list(tensors.values())
        self._runs = self._find_runs()
        self._joined: WeakValueDictionary[int, np.ndarray] = WeakValueDictionary()  # pieces in flight, by position

    def produce(self, state: dict[str, int] | None, requester: str) -> tuple[str, Any, dict[str, int]]:  # noqa: ARG002
        if not state:
            return ProduceRC.OK, [self._header.to_bytes()], {_POSITION: 0}
        position = state[_POSITION]
        if position >= self._header.total:
            return ProduceRC.EOF, None, {}
        piece = self._piece(position)
        return ProduceRC.OK, [piece], {_POSITION: position + len(piece)}

    def release(self) -> None:
        self.base_obj, self._tensors, self._runs = None, [], []

    def _find_runs(self) -> list[_Run | None]:
        """The run that each tensor is part of, None for one outside of any block."""
        runs: list[_Run | None] = []
        for tensor, start, end in zip(self._tensors, self._header.starts, self._header.ends, strict=True):
            if not isinstance(tensor, BlockTensor):
                runs.append(None)
                continue
            offset = start - (tensor.data_ptr() - tensor.block.address)
            last = runs[-1] if runs else None
            run = last if last and last.block is tensor.block and last.offset == offset else _Run(tensor.block, offset)
            run.end = end
            runs.append(run)
        return runs

    def _piece(self, position: int) -> memoryview:
        if self.base_obj is None:
            raise RuntimeError("the tensors of this stream have been released")
        index, size = self._header.index_at(position), self._header.piece_size
        run = self._runs[index]
        if run and run.end - position >= size:
            self._will_allocate(self._allocated_by_view)
            return run.block.content[position - run.offset :][:size]
        if self._header.ends[index] - position >= size:
            self._will_allocate(size if isinstance(self._tensors[index], LazyTensor) else self._allocated_by_view)
            return self._bytes(index, position, size)
        joined = self._joined.get(position)
        if joined is None:  # otherwise it is being sent to another receiver
            self._will_allocate(size)
            joined = self._joined[position] = self._join(index, position)
        return memoryview(joined)  # type: ignore[arg-type]

    def _join(self, index: int, position: int) -> np.ndarray:
        """Copy a piece's bytes: the rest of tensor `index`, and the tensors after it."""
        begin, end = position, min(position + self._header.piece_size, self._header.total)
        joined = np.zeros(end - begin, dtype=np.uint8)
        while position < end:
            position = max(position, self._header.starts[index])  # past a gap
            part = self._bytes(index, position, max(0, min(end, self._header.ends[index]) - position))
            joined[position - begin :][: len(part)] = part
            position += len(part)
            index += 1
        return joined

    def _bytes(self, index: int, position: int, size: int) -> memoryview:
        """`size` bytes of tensor `index` from a stream position on."""
        tensor, begin = self._tensors[index], position - self._header.starts[index]
        if not isinstance(tensor, LazyTensor):
            return _view(tensor)[begin : begin + size]
        first, last = begin // tensor.itemsize, -(-(begin + size) // tensor.itemsize)
        return _view(tensor.make(first, last))[begin - first * tensor.itemsize :][:size]

    def _will_allocate(self, size: int) -> None:
        """Count bytes about to be allocated, and collect sent messages when there may be many."""
        self._allocated += size
        if self._allocated > _MAX_UNCOLLECTED:
            self._allocated = 0
            collect_messages()


@dataclass
class _Run:
    """Consecutive tensors of a stream, up to byte `end`, laid out in a memory block as in the stream.

    The block's first byte corresponds to stream position `offset`.
    """

    block: MemoryBlock
    offset: int
    end: int = 0


def _header_of(tensors: Mapping[str, torch.Tensor], piece_size: int) -> StreamHeader:
    headers, last = [], None
    for name, tensor in tensors.items():
        delta = (tensor.target, tensor.version) if isinstance(tensor, Delta) else None
        headers.append(TensorHeader(name, str(tensor.dtype), list(tensor.shape), delta, _gap(last, tensor)))
        last = tensor
    return StreamHeader(headers, piece_size)


def _gap(last: torch.Tensor | None, tensor: torch.Tensor) -> int:
    """Bytes between two tensors in the same block if at most MAX_GAP, otherwise 0."""
    if not isinstance(last, BlockTensor) or not isinstance(tensor, BlockTensor) or last.block is not tensor.block:
        return 0
    gap = tensor.data_ptr() - last.data_ptr() - last.nbytes
    return gap if 0 <= gap <= MAX_GAP else 0


def _view(tensor: torch.Tensor) -> memoryview:
    content: Any = flat_bytes(tensor).numpy()
    return memoryview(content)
