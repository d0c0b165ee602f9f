"""One process's endpoint of a job's tensor streams: how it sends tensors and where it puts received ones."""

from dataclasses import dataclass, field
from typing import Protocol

import torch

from fedsft_assets.federation.transport.buffers import ReusedFiles, ReusedMemory
from fedsft_assets.federation.transport.header import MAX_PIECE

_MIN_PIECE = 1 << 20  # bytes
_OF_ALL_PEERS = 160 << 20  # bytes in flight, one piece per peer


def piece_size_for(peers: int) -> int:
    """Piece size in bytes that bounds the memory of a process sending to many peers at once."""
    return min(max(_OF_ALL_PEERS // max(1, peers), _MIN_PIECE), MAX_PIECE)


class DeltaSum(Protocol):
    """Tensors to which deltas are added while they arrive, so that deltas take no memory."""

    def begin(self, version: int) -> bool:
        """Return whether to add the deltas that lead to `version`; until `end`, only some are added.

        Raises an error, which ends the job, if the deltas do not match the tensors.
        """

    def add(self, name: str, first: int, values: torch.Tensor) -> None:
        """Add `values` to a tensor's elements from index `first` on, in row-major order."""

    def end(self, version: int) -> None:
        """Called when all deltas that lead to `version` are added."""


@dataclass(eq=False)
class TensorEndpoint:
    """How a process sends and receives tensors.

    Sends in pieces of `piece_size` bytes. Received tensors are stored in `files` as `StoredTensor` if set, otherwise in
    `memory`. There, a `Delta` is added to `deltas` if set, and received as an empty tensor on the device `meta`.
    """

    piece_size: int = MAX_PIECE
    deltas: DeltaSum | None = None
    files: ReusedFiles | None = None
    memory: ReusedMemory = field(default_factory=ReusedMemory)

    def adapt_to(self, piece_size: int) -> None:
        """Send in pieces no larger than a peer's: the server limits them by its number of peers."""
        self.piece_size = min(self.piece_size, max(piece_size, _MIN_PIECE))
