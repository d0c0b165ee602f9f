"""How tensors travel between the server part of a job and its trainers: as one stream of bytes, cut into pieces.

NVFlare fetches tensors one by one, each packed into a file of its own in memory, and copies them at every step. Here
a piece is a view of the tensor's own memory where it can be, and all pieces are of the same modest size, so that
memory is used again instead of being asked for anew: on most machines that costs more than the copies themselves.
It needs torch and NVFlare only. Both ends must have it; NVFlare's processes between them forward bytes that they do
not look at.
"""

from __future__ import annotations

import ctypes
import json
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, Protocol, Self
from weakref import WeakValueDictionary

import numpy as np
import torch
from nvflare.app_opt.pt import tensor_downloader
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.f3.streaming.download_service import Consumer, Downloadable, ProduceRC
from nvflare.fuel.utils import fobs
from nvflare.fuel.utils.fobs import dots

from fedsft_assets.federation.allocator import collect_messages, keep_freed_memory
from fedsft_assets.federation.tensor_storage import ReusedFile, ReusedFiles, StoredTensor, memory_block

_LARGEST_PIECE = 10 << 20  # bytes; pieces of so many are what NVFlare sends as they lie in memory
_SMALLEST_PIECE = 1 << 20
_OF_ALL_PEERS = 160 << 20  # bytes in pieces, one for each peer
_MOST_SENT = 20 << 20  # bytes of memory that went into sending, and may still be held afterwards
_SENDERS_OWN = 1 << 20  # bytes that NVFlare takes to send a piece as it lies in memory
_LARGEST_GAP = 4096  # bytes between tensors that lie together, which travel with them
_AT = "at"

_piece = _LARGEST_PIECE  # bytes
_sum: Sum | None = None
_files: ReusedFiles | None = None  # where tensors go that arrive; in memory if it is None


@contextmanager
def tensors_stored_in(folder: Path) -> Iterator[None]:
    """Tensors that arrive meanwhile lie in files there, as StoredTensor; a file is for one message at a time.

    NVFlare has the like, but in its simulator it does not reach the connection that results come by.
    """
    global _files  # noqa: PLW0603 one for the process, as NVFlare's decomposers are
    folder.mkdir()
    before, _files = _files, ReusedFiles(folder)
    try:
        yield
    finally:
        _files = before
        shutil.rmtree(folder, ignore_errors=True)


def send_tensors_as_streams(peers: int = 1) -> None:
    """Have this process send and receive tensors in this way; to be called before NVFlare has one of its own.

    With many peers pieces are smaller, so that memory does not grow with their number; peers follow suit. Raises
    RuntimeError if NVFlare has a way of its own already.
    """
    _follow(_OF_ALL_PEERS // max(1, peers))
    fobs.register(StreamedTensors)
    found = type(fobs.get_dot_handler(dots.TENSOR_DOWNLOAD)).__name__
    if found != StreamedTensors.__name__:  # by name: a job folder may bring this module a second time
        raise RuntimeError(f"tensors are sent by NVFlare's {found} in this process, which the other end does not read")
    keep_freed_memory()


def _follow(piece: int) -> None:
    """Send in pieces of so many bytes from now on, or what is nearest."""
    global _piece  # noqa: PLW0603
    _piece = min(max(piece, _SMALLEST_PIECE), _LARGEST_PIECE)


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


class Sum(Protocol):
    """To which tensors are added while they arrive, so that they take no memory."""

    def begin(self, version: int) -> bool:
        """Whether the addends are wanted; from now on some are added and some are not. What it raises ends the job."""

    def add(self, name: str, first: int, numbers: torch.Tensor) -> None:
        """Add numbers to those of a tensor from the first on, as they lie in memory."""

    def end(self, version: int) -> None:
        """All is added."""


def add_to(sum: Sum | None) -> None:
    """Where addends that arrive in this process go; in their place comes an empty tensor on the device `meta`."""
    global _sum  # noqa: PLW0603
    _sum = sum


class StreamedTensors(TensorDecomposer):
    """In place of NVFlare's decomposer of tensors."""

    def to_downloadable(self, items: dict[str, torch.Tensor], max_chunk_size: int, fobs_ctx: dict) -> Downloadable:  # noqa: ARG002
        return _Sending(items)

    def download(self, from_fqcn: str, ref_id: str, *, fobs_ctx: Any = None, **settings: Any) -> Any:  # noqa: ARG002
        """Fetch the tensors of a message; returns an error, or None, and the tensors by NVFlare's names for them."""
        receiving = _Stored(_files.take()) if _files else _Arriving()
        tensor_downloader.download_object(from_fqcn=from_fqcn, ref_id=ref_id, consumer=receiving, **settings)
        return receiving.error, receiving.tensors


@dataclass(frozen=True)
class _Described:
    """One tensor of a stream. `added` is to what it is to be added; `gap` are bytes before it that mean nothing."""

    name: str
    dtype: str
    shape: list[int]
    added: tuple[str, int] | None
    gap: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * _dtype(self.dtype).itemsize


class _Contents:
    """What a stream has: tensors one after the other, and where in it each of them begins and ends.

    `piece` is the size of its pieces in bytes.
    """

    def __init__(self, tensors: Sequence[_Described], piece: int) -> None:
        self.tensors, self.piece = tensors, piece
        self.ends = list(accumulate(one.gap + one.nbytes for one in tensors))
        self.starts = [end - one.nbytes for end, one in zip(self.ends, tensors, strict=True)]
        self.total = self.ends[-1] if tensors else 0

    @classmethod
    def of(cls, items: Mapping[str, torch.Tensor], piece: int) -> Self:
        tensors, before = list(items.values()), [None, *items.values()]
        return cls(
            [
                _Described(name, str(one.dtype), list(one.shape), getattr(one, "added_to", None), _gap(last, one) or 0)
                for name, one, last in zip(items, tensors, before, strict=False)
            ],
            piece,
        )

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        said = json.loads(content)
        return cls([_Described(*one) for one in said["tensors"]], said["piece"])

    def to_bytes(self) -> bytes:
        return json.dumps({"piece": self.piece, "tensors": [astuple(one) for one in self.tensors]}).encode()

    def at(self, position: int) -> int:
        """Which tensor has the byte at a position, or the gap before it."""
        return bisect_right(self.ends, position)


class _Sending(Downloadable):
    """The tensors of one message; whoever fetches them says at which byte it is."""

    def __init__(self, items: Mapping[str, torch.Tensor]) -> None:
        self.base_obj: dict[str, torch.Tensor] | None = dict(items)
        super().__init__(self.base_obj)
        self._sent = 0  # bytes of memory since the last collection
        self._contents = _Contents.of(items, _piece)
        self._copied = _SENDERS_OWN if _piece == _LARGEST_PIECE else _piece  # bytes, of a piece that lies in memory
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


def _gap(one: torch.Tensor | None, other: torch.Tensor) -> int | None:
    """Bytes between two tensors that lie together, the second soon after the first; None of others."""
    together = getattr(other, "together", None)
    if one is None or together is None or getattr(one, "together", None) is not together:
        return None
    gap = other.data_ptr() - one.data_ptr() - one.nbytes
    return gap if one.nbytes and other.nbytes and 0 <= gap <= _LARGEST_GAP else None


class _Receiving(Consumer):
    """Takes the pieces of a stream in their order."""

    supports_pipelining = True

    def __init__(self) -> None:
        super().__init__()
        self.error: str | None = None
        self._contents: _Contents | None = None
        self._position = 0

    def consume(self, ref_id: str, state: dict[str, int], data: list[bytes]) -> dict[str, int]:  # noqa: ARG002
        for piece in data:
            if self._contents is None:
                self._contents = _Contents.from_bytes(piece)
                _follow(self._contents.piece)
                self.begin(self._contents)
            else:
                self.take(self._contents, self._position, piece)
                self._position += len(piece)
        return state

    def download_completed(self, ref_id: str) -> None:  # noqa: ARG002
        if self._contents is None or self._position != self._contents.total:
            raise RuntimeError("the stream of tensors ended early")
        self.finish(self._contents)

    def download_failed(self, ref_id: str, reason: str) -> None:  # noqa: ARG002
        self.error = reason

    def begin(self, contents: _Contents) -> None:
        """The stream begins."""

    def take(self, contents: _Contents, position: int, piece: bytes) -> None:
        """The next bytes are here."""
        raise NotImplementedError

    def finish(self, contents: _Contents) -> None:
        """All of them were there."""


class _Arriving(_Receiving):
    """Into memory: each tensor is filled as its bytes come, or added to what is there.

    All of them lie in one block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[str, torch.Tensor] = {}
        self._sum: Sum | None = None
        self._version: int | None = None
        self._wanted = False

    def begin(self, contents: _Contents) -> None:
        self._version = next((one.added[1] for one in contents.tensors if one.added), None)
        self._sum = _sum if self._version is not None else None
        if self._sum and self._version is not None:
            self._wanted = self._sum.begin(self._version)
        collect_messages()  # the last one's tensors would be here beside the new ones
        held = [one for one in contents.tensors if not (self._sum and one.added)]
        starts = [0, *accumulate(_aligned(one.nbytes) for one in held)]
        block = memory_block(starts[-1])
        for one, start in zip(held, starts, strict=False):
            self.tensors[one.name] = block[start : start + one.nbytes].view(_dtype(one.dtype)).reshape(one.shape)
        for one in contents.tensors:
            if one.name not in self.tensors:
                self.tensors[one.name] = torch.empty(one.shape, dtype=_dtype(one.dtype), device="meta")

    def take(self, contents: _Contents, position: int, piece: bytes) -> None:
        content = np.frombuffer(piece, dtype=np.uint8)
        while len(content):
            index = contents.at(position)
            one, begin = contents.tensors[index], position - contents.starts[index]
            rest = -begin if begin < 0 else contents.ends[index] - position
            part, content = content[:rest], content[rest:]
            if begin < 0:
                pass  # between two tensors
            elif not (self._sum and one.added):
                _flat(self.tensors[one.name]).numpy()[begin : begin + len(part)] = part
            elif self._wanted:
                numbers = torch.frombuffer(bytearray(part), dtype=_dtype(one.dtype))
                self._sum.add(one.added[0], begin // numbers.itemsize, numbers)
            position += len(part)

    def finish(self, contents: _Contents) -> None:  # noqa: ARG002
        if self._sum and self._wanted and self._version is not None:
            self._sum.end(self._version)


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


class _StoredTensors(dict[str, StoredTensor]):
    """As NVFlare looks at what it has received and left on the disk."""

    def make_lazy_ref(self, name: str) -> StoredTensor:
        return self[name]


class _Stored(_Receiving):
    """Into a file."""

    def __init__(self, file: ReusedFile) -> None:
        super().__init__()
        self.tensors = _StoredTensors()
        self._file: ReusedFile | None = file
        file.path.touch()
        self._opened = file.path.open("r+b", buffering=0)

    def take(self, contents: _Contents, position: int, piece: bytes) -> None:  # noqa: ARG002
        rest = memoryview(piece)
        while rest:
            rest = rest[self._opened.write(rest) :]

    def finish(self, contents: _Contents) -> None:
        assert self._file
        for one, start in zip(contents.tensors, contents.starts, strict=True):
            self.tensors[one.name] = StoredTensor(self._file, start, _dtype(one.dtype), tuple(one.shape))
        self._let_go()

    def download_failed(self, ref_id: str, reason: str) -> None:
        super().download_failed(ref_id, reason)
        self._let_go()

    def _let_go(self) -> None:
        self._opened.close()
        self._file = None


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor; the very memory of one that lies there without gaps."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _view(tensor: torch.Tensor) -> memoryview:
    content: Any = _flat(tensor).numpy()
    return memoryview(content)


def _dtype(name: str) -> torch.dtype:
    """Of the name that `str` gives it. Raises ValueError for what is none."""
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no type of a tensor")
    return dtype
