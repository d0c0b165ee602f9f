"""How tensors travel between the server part of a job and its trainers: as one stream of bytes, cut into pieces.

NVFlare fetches tensors one by one, each packed into a file of its own in memory, and copies them at every step. Here
a piece is a view of the tensor's own memory where it can be, and all pieces are of the same modest size, so that
memory is used again instead of being asked for anew: on most machines that costs more than the copies themselves.
It needs torch and NVFlare only. Both ends must have it; NVFlare's processes between them forward bytes that they do
not look at.
"""

from __future__ import annotations

import json
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from nvflare.app_opt.pt import tensor_downloader
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.f3.streaming.download_service import Consumer, Downloadable, ProduceRC
from nvflare.fuel.utils import fobs
from nvflare.fuel.utils.fobs import dots

from fedsft_assets.federation.allocator import collect_messages, keep_freed_memory
from fedsft_assets.federation.tensor_storage import ReusedFile, ReusedFiles, StoredTensor, memory_block

_PIECE = 10 << 20  # bytes
_VIEW = _PIECE  # from so many bytes on, NVFlare sends a piece as it lies in memory
_MOST_MADE = 3 * _PIECE  # bytes of pieces that were made to be sent, and may still be here afterwards
_AT = "at"

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


def send_tensors_as_streams() -> None:
    """Have this process send and receive tensors in this way; to be called before NVFlare has one of its own.

    Raises RuntimeError if it has one.
    """
    fobs.register(StreamedTensors)
    found = type(fobs.get_dot_handler(dots.TENSOR_DOWNLOAD)).__name__
    if found != StreamedTensors.__name__:  # by name: a job folder may bring this module a second time
        raise RuntimeError(f"tensors are sent by NVFlare's {found} in this process, which the other end does not read")
    keep_freed_memory()


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


class _Contents:
    """What a stream has: names, types and shapes of tensors, one after the other, and to what they are to be added."""

    def __init__(self, tensors: list[tuple[str, str, list[int], tuple[str, int] | None]]) -> None:
        self.tensors = tensors
        sizes = [prod(shape) * _dtype(dtype).itemsize for _, dtype, shape, _ in tensors]
        self.ends = list(accumulate(sizes))
        self.starts = [end - size for end, size in zip(self.ends, sizes, strict=True)]
        self.total = self.ends[-1] if sizes else 0

    def at(self, position: int) -> int:
        """Which tensor has the byte at a position."""
        return bisect_right(self.ends, position)


class _Sending(Downloadable):
    """The tensors of one message; whoever fetches them says at which byte it is."""

    def __init__(self, items: Mapping[str, torch.Tensor]) -> None:
        self.base_obj: dict[str, torch.Tensor] | None = dict(items)
        super().__init__(self.base_obj)
        self._made = 0  # bytes since the last collection
        self._contents = _Contents(
            [
                (name, str(tensor.dtype), list(tensor.shape), getattr(tensor, "added_to", None))
                for name, tensor in items.items()
            ]
        )

    def produce(self, state: dict[str, int] | None, requester: str) -> tuple[str, Any, dict[str, int]]:  # noqa: ARG002
        if not state:
            return ProduceRC.OK, [json.dumps(self._contents.tensors).encode()], {_AT: 0}
        position = state[_AT]
        if position >= self._contents.total:
            return ProduceRC.EOF, None, {}
        piece = self._piece(position)
        return ProduceRC.OK, [piece], {_AT: position + len(piece)}

    def release(self) -> None:
        self.base_obj = None

    def _piece(self, position: int) -> memoryview | bytes:
        index = self._contents.at(position)
        rest = self._contents.ends[index] - position
        if rest >= _VIEW:
            return self._bytes(index, position, min(rest, _PIECE))
        parts = []
        end = min(position + _PIECE, self._contents.total)
        while position < end:
            part = self._bytes(index, position, min(end, self._contents.ends[index]) - position)
            parts.append(part)
            position += len(part)
            index += 1
        return b"".join(parts)

    def _bytes(self, index: int, position: int, size: int) -> memoryview:
        """Of the tensor `index`, which lies at the position of the stream."""
        if self.base_obj is None:
            raise RuntimeError("the tensors are no longer here")
        tensor = self.base_obj[self._contents.tensors[index][0]]
        begin, itemsize = position - self._contents.starts[index], tensor.itemsize
        if not tensor.is_meta:
            return _view(tensor)[begin : begin + size]
        self._made += size
        if self._made > _MOST_MADE:
            self._made = 0
            collect_messages()  # and the pieces that were sent with them
        first, last = begin // itemsize, -(-(begin + size) // itemsize)
        content = _view(tensor.make(first, last))  # type: ignore[attr-defined]
        return content[begin - first * itemsize :][:size]


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
                self._contents = _Contents(json.loads(piece))
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
        self._version = next((added[1] for *_, added in contents.tensors if added), None)
        self._sum = _sum if self._version is not None else None
        if self._sum and self._version is not None:
            self._wanted = self._sum.begin(self._version)
        collect_messages()  # the last one's tensors would be here beside the new ones
        held = [index for index, (*_, added) in enumerate(contents.tensors) if not (self._sum and added)]
        starts = [0, *accumulate(_aligned(contents.ends[index] - contents.starts[index]) for index in held)]
        block = memory_block(starts[-1])
        for index, start in zip(held, starts, strict=False):
            name, dtype, shape, _ = contents.tensors[index]
            size = contents.ends[index] - contents.starts[index]
            self.tensors[name] = block[start : start + size].view(_dtype(dtype)).reshape(shape)
        for name, dtype, shape, _ in contents.tensors:
            if name not in self.tensors:
                self.tensors[name] = torch.empty(shape, dtype=_dtype(dtype), device="meta")

    def take(self, contents: _Contents, position: int, piece: bytes) -> None:
        content = np.frombuffer(piece, dtype=np.uint8)
        while len(content):
            index = contents.at(position)
            name, dtype, _, added = contents.tensors[index]
            begin, rest = position - contents.starts[index], contents.ends[index] - position
            part, content = content[:rest], content[rest:]
            if not (self._sum and added):
                _flat(self.tensors[name]).numpy()[begin : begin + len(part)] = part
            elif self._wanted:
                numbers = torch.frombuffer(bytearray(part), dtype=_dtype(dtype))
                self._sum.add(added[0], begin // numbers.itemsize, numbers)
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
        for (name, dtype, shape, _), start in zip(contents.tensors, contents.starts, strict=True):
            self.tensors[name] = StoredTensor(self._file, start, _dtype(dtype), tuple(shape))
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
