"""Tensors on their way out: each message's are one stream of bytes, cut into pieces when they are asked for.

A piece is a view of the tensor's own memory where it can be. Tensors may say of themselves that they lie in memory
beside others, are made when they are sent, or are to be added to what the other end has.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from nvflare.fuel.f3.streaming.download_service import Downloadable, ProduceRC

from fedsft_assets.federation.transport.header import (
    LARGEST_GAP,
    LARGEST_PIECE,
    Contents,
    TensorHeader,
    flat_bytes,
    piece_size,
)
from fedsft_assets.memory import collect_messages

_MOST_SENT = 20 << 20  # bytes of memory that went into sending, and may still be held afterwards
_SENDERS_OWN = 1 << 20  # bytes that NVFlare takes to send a piece as it lies in memory
_AT = "at"


def made_when_sent(
    shape: tuple[int, ...], dtype: torch.dtype, make: Callable[[int, int], torch.Tensor]
) -> torch.Tensor:
    """Stands for a tensor that is made when its turn has come to be sent, a piece at a time.

    `make` gives its numbers, as they lie in memory, from the first to before the last; it may be asked more than
    once for the same, and must answer the same.
    """
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    tensor.make = make  # type: ignore[attr-defined]
    return tensor


def made(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or the one that it stands for."""
    return tensor.make(0, tensor.numel()).reshape(tensor.shape) if tensor.is_meta else tensor  # type: ignore[attr-defined]


def addend(tensor: torch.Tensor, name: str, version: int) -> torch.Tensor:
    """The tensor, to be added at the other end to what is there under that name, if there is a Sum for it.

    `version` is that of the sums which follow; all addends of a message have the same.
    """
    tensor.added_to = name, version  # type: ignore[attr-defined]
    return tensor


def lie_together(tensors: Iterable[torch.Tensor]) -> None:
    """Say that tensors lie in one stretch of memory, in which all that is near them may be seen by whoever gets them.

    That is so of a mapped file. They are sent as they lie there, small ones too, whoever many they are sent to.
    """
    filled = [tensor for tensor in tensors if tensor.nbytes]
    together = _Together(filled) if filled else None
    for tensor in filled:
        tensor.together = together  # type: ignore[attr-defined]


class Sending(Downloadable):
    """The tensors of one message; whoever fetches them says at which byte it is."""

    def __init__(self, items: Mapping[str, torch.Tensor]) -> None:
        self.base_obj: dict[str, torch.Tensor] | None = dict(items)
        super().__init__(self.base_obj)
        self._sent = 0  # bytes of memory since the last collection
        piece = piece_size()
        self._contents = _contents(items, piece)
        self._copied = _SENDERS_OWN if piece == LARGEST_PIECE else piece  # bytes, of a piece that lies in memory
        self._tensors = list(items.values())
        self._runs = self._all_runs()
        self._joined: WeakValueDictionary[int, np.ndarray] = WeakValueDictionary()  # pieces on their way, by position

    def produce(self, state: dict[str, int] | None, requester: str) -> tuple[str, Any, dict[str, int]]:  # noqa: ARG002
        if not state:
            return ProduceRC.OK, [self._contents.to_bytes()], {_AT: 0}
        position = state[_AT]
        if position >= self._contents.total:
            return ProduceRC.EOF, None, {}
        piece = self._piece(position)
        return ProduceRC.OK, [piece], {_AT: position + len(piece)}

    def release(self) -> None:
        self.base_obj, self._tensors, self._runs = None, [], []

    def _all_runs(self) -> list[_Run | None]:
        """For each tensor, of which run it is a part, if it lies together with others."""
        runs: list[_Run | None] = []
        for index, tensor in enumerate(self._tensors):
            together: _Together | None = getattr(tensor, "together", None)
            if together is None:
                runs.append(None)
                continue
            at = self._contents.starts[index] - (tensor.data_ptr() - together.begin)
            before = runs[-1] if runs else None
            run = before if before and before.together is together and before.at == at else _Run(together, at, 0)
            run.end = self._contents.ends[index]
            runs.append(run)
        return runs

    def _piece(self, position: int) -> memoryview:
        if self.base_obj is None:
            raise RuntimeError("the tensors are no longer here")
        index = self._contents.at(position)
        run, piece = self._runs[index], self._contents.piece
        if run and run.end - position >= piece:
            self._count(self._copied)
            return run.together.content[position - run.at :][:piece]
        if self._contents.ends[index] - position >= piece:
            self._count(piece if self._tensors[index].is_meta else self._copied)
            return self._bytes(index, position, piece)
        joined = self._joined.get(position)
        if joined is None:  # else it is on its way to somebody already
            self._count(piece)
            joined = self._joined[position] = self._join(index, position)
        return memoryview(joined)  # type: ignore[arg-type]

    def _join(self, index: int, position: int) -> np.ndarray:
        """The rest of the tensor `index`, and tensors behind it, in memory of their own."""
        begin, end = position, min(position + self._contents.piece, self._contents.total)
        joined = np.zeros(end - begin, dtype=np.uint8)
        while position < end:
            position = max(position, self._contents.starts[index])  # past a gap
            part = self._bytes(index, position, max(0, min(end, self._contents.ends[index]) - position))
            joined[position - begin :][: len(part)] = part
            position += len(part)
            index += 1
        return joined

    def _bytes(self, index: int, position: int, size: int) -> memoryview:
        """Of the tensor `index`, which lies at the position of the stream."""
        tensor = self._tensors[index]
        begin, itemsize = position - self._contents.starts[index], tensor.itemsize
        if not tensor.is_meta:
            return _view(tensor)[begin : begin + size]
        first, last = begin // itemsize, -(-(begin + size) // itemsize)
        content = _view(tensor.make(first, last))  # type: ignore[attr-defined]
        return content[begin - first * itemsize :][:size]

    def _count(self, size: int) -> None:
        """So many bytes are to be asked for; now and then those are let go of that have been sent."""
        self._sent += size
        if self._sent > _MOST_SENT:
            self._sent = 0
            collect_messages()


def _contents(items: Mapping[str, torch.Tensor], piece: int) -> Contents:
    tensors, before = list(items.values()), [None, *items.values()]
    return Contents(
        [
            TensorHeader(name, str(one.dtype), list(one.shape), getattr(one, "added_to", None), _gap(last, one))
            for name, one, last in zip(items, tensors, before, strict=False)
        ],
        piece,
    )


class _Together:
    """The memory from the first of some tensors to the last; what is sent of it keeps it."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.begin = min(tensor.data_ptr() for tensor in tensors)
        size = max(tensor.data_ptr() + tensor.nbytes for tensor in tensors) - self.begin
        content = (ctypes.c_ubyte * size).from_address(self.begin)
        content.storages = [tensor.untyped_storage() for tensor in tensors]  # type: ignore[attr-defined]
        self.content = memoryview(content).cast("B")


@dataclass
class _Run:
    """Tensors of a stream, up to its byte `end`, that lie in memory as they do in the stream: from its byte `at` on."""

    together: _Together
    at: int
    end: int


def _gap(one: torch.Tensor | None, other: torch.Tensor) -> int:
    """Bytes between two tensors that lie together, the second soon after the first; 0 of others."""
    together = getattr(other, "together", None)
    if one is None or together is None or getattr(one, "together", None) is not together:
        return 0
    gap = other.data_ptr() - one.data_ptr() - one.nbytes
    return gap if one.nbytes and other.nbytes and 0 <= gap <= LARGEST_GAP else 0


def _view(tensor: torch.Tensor) -> memoryview:
    content: Any = flat_bytes(tensor).numpy()
    return memoryview(content)
