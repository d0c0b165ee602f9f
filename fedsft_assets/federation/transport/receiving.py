"""Tensors on their way in: into memory, into a file, or added to what is there while they arrive."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from nvflare.fuel.f3.streaming.download_service import Consumer

from fedsft_assets.federation.transport.buffers import ReusedFile, ReusedFiles, StoredTensor, memory_block
from fedsft_assets.federation.transport.header import Contents, dtype_of, flat_bytes, send_pieces_of
from fedsft_assets.memory import collect_messages

_SHOWN = 200  # characters of an error

_sum: Sum | None = None
_files: ReusedFiles | None = None  # where tensors go that arrive; in memory if it is None


@contextmanager
def tensors_stored_in(folder: Path, at_most: int | None = None) -> Iterator[None]:
    """Tensors that arrive meanwhile lie in files there, as StoredTensor; a file is for one message at a time.

    A message may have `at_most` so many bytes in tensors.

    NVFlare has the like, but in its simulator it does not reach the connection that results come by.
    """
    global _files  # noqa: PLW0603 one for the process, as NVFlare's decomposers are
    folder.mkdir()
    before, _files = _files, ReusedFiles(folder, at_most)
    try:
        yield
    finally:
        _files = before
        shutil.rmtree(folder, ignore_errors=True)


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


def receiver() -> Arriving | Stored:
    """What takes the next message's tensors."""
    return Stored(_files.take(), _files.at_most) if _files else Arriving()


class _Receiving(Consumer):
    """Takes the pieces of a stream in their order."""

    supports_pipelining = True

    def __init__(self) -> None:
        super().__init__()
        self.error: str | None = None
        self.fault: OSError | None = None  # of this machine, which NVFlare would take for one of the peer
        self._contents: Contents | None = None
        self._position = 0

    def consume(self, ref_id: str, state: dict[str, int], data: list[bytes]) -> dict[str, int]:  # noqa: ARG002
        for piece in data:
            if self._contents is None:
                self._contents = Contents.from_bytes(piece)
                send_pieces_of(self._contents.piece)  # as the peer does
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

    def begin(self, contents: Contents) -> None:
        """The stream begins."""

    def take(self, contents: Contents, position: int, piece: bytes) -> None:
        """The next bytes are here."""
        raise NotImplementedError

    def finish(self, contents: Contents) -> None:
        """All of them were there."""


class Arriving(_Receiving):
    """Into memory: each tensor is filled as its bytes come, or added to what is there.

    All of them lie in one block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[str, torch.Tensor] = {}
        self._sum: Sum | None = None
        self._version: int | None = None
        self._wanted = False

    def begin(self, contents: Contents) -> None:
        self._version = next((one.added[1] for one in contents.tensors if one.added), None)
        self._sum = _sum if self._version is not None else None
        if self._sum and self._version is not None:
            self._wanted = self._sum.begin(self._version)
        collect_messages()  # the last one's tensors would be here beside the new ones
        held = [one for one in contents.tensors if not (self._sum and one.added)]
        starts = [0, *accumulate(_aligned(one.nbytes) for one in held)]
        block = memory_block(starts[-1])
        for one, start in zip(held, starts, strict=False):
            self.tensors[one.name] = block[start : start + one.nbytes].view(dtype_of(one.dtype)).reshape(one.shape)
        for one in contents.tensors:
            if one.name not in self.tensors:
                self.tensors[one.name] = torch.empty(one.shape, dtype=dtype_of(one.dtype), device="meta")

    def take(self, contents: Contents, position: int, piece: bytes) -> None:
        content = np.frombuffer(piece, dtype=np.uint8)
        while len(content):
            index = contents.at(position)
            one, begin = contents.tensors[index], position - contents.starts[index]
            rest = -begin if begin < 0 else contents.ends[index] - position
            part, content = content[:rest], content[rest:]
            if begin < 0:
                pass  # between two tensors
            elif not (self._sum and one.added):
                flat_bytes(self.tensors[one.name]).numpy()[begin : begin + len(part)] = part
            elif self._wanted:
                numbers = torch.frombuffer(bytearray(part), dtype=dtype_of(one.dtype))
                self._sum.add(one.added[0], begin // numbers.itemsize, numbers)
            position += len(part)

    def finish(self, contents: Contents) -> None:  # noqa: ARG002
        if self._sum and self._wanted and self._version is not None:
            self._sum.end(self._version)


def _aligned(size: int) -> int:
    return -(-size // 64) * 64


@dataclass(frozen=True)
class BrokenTensor:
    """Stands for a tensor that did not come as it must. NVFlare would end the receiving process for an error."""

    why: str


class _StoredTensors(dict[str, StoredTensor]):
    """As NVFlare looks at what it has received and left on the disk."""

    broken: BrokenTensor | None = None

    def __contains__(self, name: object) -> bool:
        """Whatever is asked for, there is something that stands for it."""
        return True

    def make_lazy_ref(self, name: str) -> StoredTensor | BrokenTensor:
        return self.broken or self.get(name) or BrokenTensor("it is not in the stream")


class Stored(_Receiving):
    """Into a file, no more than `at_most` bytes. What cannot be used does not fail, and stands for what was sent."""

    def __init__(self, file: ReusedFile, at_most: int | None = None) -> None:
        super().__init__()
        self.tensors = _StoredTensors()
        self._at_most = at_most
        self._file: ReusedFile | None = file
        file.path.touch()
        self._opened = file.path.open("r+b", buffering=0)

    def consume(self, ref_id: str, state: dict[str, int], data: list[bytes]) -> dict[str, int]:
        if self.tensors.broken:
            return state
        try:
            return super().consume(ref_id, state, data)
        except ValueError as error:
            self._break(f"its stream has no contents that can be read ({' '.join(str(error).split())[:_SHOWN]})")
            return state
        except OSError as error:
            self.fault = error
            raise

    def begin(self, contents: Contents) -> None:
        if self._at_most is not None and contents.total > self._at_most:
            self._break(f"{contents.total:,} bytes of tensors, where the model has {self._at_most:,} at most")

    def take(self, contents: Contents, position: int, piece: bytes) -> None:
        if position + len(piece) > contents.total:
            self._break("its stream is longer than its contents say")
        rest = memoryview(b"" if self.tensors.broken else piece)
        while rest:
            rest = rest[self._opened.write(rest) :]

    def download_completed(self, ref_id: str) -> None:
        if self._contents is None or self._position != self._contents.total:
            self._break("its stream ended early")
        if not self.tensors.broken:
            super().download_completed(ref_id)
        self._let_go()

    def _break(self, why: str) -> None:
        self.tensors.broken = self.tensors.broken or BrokenTensor(why)

    def finish(self, contents: Contents) -> None:
        assert self._file
        for one, start in zip(contents.tensors, contents.starts, strict=True):
            self.tensors[one.name] = StoredTensor(self._file, start, dtype_of(one.dtype), tuple(one.shape))

    def download_failed(self, ref_id: str, reason: str) -> None:
        super().download_failed(ref_id, reason)
        self._let_go()

    def _let_go(self) -> None:
        self._opened.close()
        self._file = None
