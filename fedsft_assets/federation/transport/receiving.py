"""Receiving side: stores a stream's tensors in memory or in a file, or adds them to others on arrival."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from nvflare.fuel.f3.streaming.download_service import Consumer

from fedsft_assets.federation.transport.buffers import ReusedFile, StoredTensor
from fedsft_assets.federation.transport.endpoint import DeltaSum, TensorEndpoint
from fedsft_assets.federation.transport.header import StreamHeader, TensorHeader, dtype_named, flat_bytes
from fedsft_assets.memory import collect_messages

_MAX_ERROR = 200  # characters
_ALIGNMENT = 64  # bytes


class TransferError(RuntimeError):
    """The sender disappeared or became unreachable before all tensors arrived."""


def consumer_for(endpoint: TensorEndpoint) -> MemoryConsumer | FileConsumer:
    """A consumer for the tensors of the next message."""
    if endpoint.files is None:
        return MemoryConsumer(endpoint)
    return FileConsumer(endpoint, endpoint.files.take(), endpoint.files.max_bytes)


class _StreamConsumer(Consumer):
    """Consumes the header of a stream, then its pieces in order.

    `error` says what went wrong; `transfer_failed`: the transfer failed, as opposed to invalid content. `local_error`
    is an error of this machine, which NVFlare would attribute to the peer.
    """

    supports_pipelining = True

    def __init__(self, endpoint: TensorEndpoint) -> None:
        super().__init__()
        self.error: str | None = None
        self.transfer_failed = False
        self._is_readable = True
        self.local_error: OSError | None = None
        self._endpoint = endpoint
        self._header: StreamHeader | None = None
        self._position = 0

    def consume(self, ref_id: str, state: dict[str, int], data: list[bytes]) -> dict[str, int]:  # noqa: ARG002
        self._is_readable = False  # set again at the end: NVFlare treats any exception as a failed transfer
        for piece in data:
            if self._header is None:
                self._header = StreamHeader.from_bytes(piece)
                self._endpoint.adapt_to(self._header.piece_size)
                self.begin(self._header)
            else:
                self.take(self._header, self._position, piece)
                self._position += len(piece)
        self._is_readable = True
        return state

    def download_completed(self, ref_id: str) -> None:  # noqa: ARG002
        if self._header is None or self._position != self._header.total:
            raise RuntimeError("the stream of tensors ended early")
        self.finish(self._header)

    def download_failed(self, ref_id: str, reason: str) -> None:  # noqa: ARG002
        self.error, self.transfer_failed = reason, self._is_readable

    def begin(self, header: StreamHeader) -> None:
        """Called with the header, before any piece."""

    def take(self, header: StreamHeader, position: int, piece: bytes) -> None:
        """Consume the bytes of the stream at a position."""
        raise NotImplementedError

    def finish(self, header: StreamHeader) -> None:
        """Called after the last piece."""


class MemoryConsumer(_StreamConsumer):
    """Writes tensors into one memory block as bytes arrive, or adds them to the endpoint's `deltas`."""

    def __init__(self, endpoint: TensorEndpoint) -> None:
        super().__init__(endpoint)
        self.tensors: dict[str, torch.Tensor] = {}
        self._deltas: DeltaSum | None = None
        self._version = 0  # version after the deltas
        self._adds = False  # False: they were added before

    def begin(self, header: StreamHeader) -> None:
        versions = [one.delta[1] for one in header.tensors if one.delta]
        if self._endpoint.deltas and versions:
            self._deltas, self._version = self._endpoint.deltas, versions[0]
            self._adds = self._deltas.begin(self._version)
        collect_messages()  # free the last message's tensors before allocating new ones
        kept = [one for one in header.tensors if not (self._deltas and one.delta)]
        starts = [0, *accumulate(-(-one.nbytes // _ALIGNMENT) * _ALIGNMENT for one in kept)]
        block = self._endpoint.memory.take(starts[-1])
        for one, start in zip(kept, starts, strict=False):
            self.tensors[one.name] = block[start : start + one.nbytes].view(dtype_named(one.dtype)).reshape(one.shape)
        for one in header.tensors:
            if one.name not in self.tensors:
                self.tensors[one.name] = torch.empty(one.shape, dtype=dtype_named(one.dtype), device="meta")

    def take(self, header: StreamHeader, position: int, piece: bytes) -> None:
        content = np.frombuffer(piece, dtype=np.uint8)
        while len(content):
            index = header.index_at(position)
            one, begin = header.tensors[index], position - header.starts[index]
            rest = -begin if begin < 0 else header.ends[index] - position
            part, content = content[:rest], content[rest:]
            if begin >= 0:  # skip gaps
                self._put(one, begin, part)
            position += len(part)

    def finish(self, header: StreamHeader) -> None:  # noqa: ARG002
        if self._deltas and self._adds:
            self._deltas.end(self._version)

    def _put(self, one: TensorHeader, begin: int, content: np.ndarray) -> None:
        """Write or add a tensor's bytes from offset `begin` on."""
        if not self._deltas or not one.delta:
            flat_bytes(self.tensors[one.name]).numpy()[begin : begin + len(content)] = content
        elif self._adds:
            values = torch.frombuffer(bytearray(content), dtype=dtype_named(one.dtype))
            self._deltas.add(one.delta[0], begin // values.itemsize, values)


@dataclass(frozen=True)
class BrokenTensor:
    """Stands in for a tensor that cannot be used; on an exception, NVFlare would end the receiving process."""

    reason: str


class _StoredTensors(dict[str, StoredTensor]):
    """Mimics NVFlare's own mapping of tensors on disk."""

    broken: BrokenTensor | None = None

    def __contains__(self, name: object) -> bool:
        """Always True: for missing names, `make_lazy_ref` returns a `BrokenTensor`."""
        return True

    def make_lazy_ref(self, name: str) -> StoredTensor | BrokenTensor:
        return self.broken or self.get(name) or BrokenTensor("missing from the stream")


class FileConsumer(_StreamConsumer):
    """Writes a stream of at most `max_bytes` to a file; every tensor of an invalid stream is a `BrokenTensor`."""

    def __init__(self, endpoint: TensorEndpoint, file: ReusedFile, max_bytes: int | None = None) -> None:
        super().__init__(endpoint)
        self.tensors = _StoredTensors()
        self._max_bytes = max_bytes
        self._file: ReusedFile | None = file
        file.path.touch()
        self._opened = file.path.open("r+b", buffering=0)

    def consume(self, ref_id: str, state: dict[str, int], data: list[bytes]) -> dict[str, int]:
        if self.tensors.broken:
            return state
        try:
            return super().consume(ref_id, state, data)
        except ValueError as error:
            self._break(f"the header of its stream is invalid ({' '.join(str(error).split())[:_MAX_ERROR]})")
            return state
        except OSError as error:
            self.local_error = error
            raise

    def begin(self, header: StreamHeader) -> None:
        if self._max_bytes is not None and header.total > self._max_bytes:
            self._break(f"its stream has {header.total:,} bytes, expected at most {self._max_bytes:,}")

    def take(self, header: StreamHeader, position: int, piece: bytes) -> None:
        if position + len(piece) > header.total:
            self._break("its stream is longer than its header says")
        rest = memoryview(b"" if self.tensors.broken else piece)
        while rest:
            rest = rest[self._opened.write(rest) :]

    def download_completed(self, ref_id: str) -> None:
        if self._header is None or self._position != self._header.total:
            self._break("its stream ended early")
        if not self.tensors.broken:
            super().download_completed(ref_id)
        self._close()

    def finish(self, header: StreamHeader) -> None:
        assert self._file
        for one, start in zip(header.tensors, header.starts, strict=True):
            self.tensors[one.name] = StoredTensor(self._file, start, dtype_named(one.dtype), tuple(one.shape))

    def download_failed(self, ref_id: str, reason: str) -> None:
        super().download_failed(ref_id, reason)
        self._close()

    def _break(self, reason: str) -> None:
        self.tensors.broken = self.tensors.broken or BrokenTensor(reason)

    def _close(self) -> None:
        self._opened.close()
        self._file = None
