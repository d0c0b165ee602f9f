"""One process's end of the tensor streams of a job: how it sends tensors, and where those go that it receives."""

from dataclasses import dataclass, field
from typing import Protocol

import torch

from fedsft_assets.federation.transport.buffers import ReusedFiles, ReusedMemory
from fedsft_assets.federation.transport.header import MAX_PIECE

_MIN_PIECE = 1 << 20  # bytes
_OF_ALL_PEERS = 160 << 20  # bytes of pieces on their way at a time, one for each peer


def piece_size_for(peers: int) -> int:
    """Bytes of a piece, so that the memory of a process that sends to many peers at a time does not grow with them."""
    return min(max(_OF_ALL_PEERS // max(1, peers), _MIN_PIECE), MAX_PIECE)


class DeltaSum(Protocol):
    """Tensors to which deltas are added while they arrive, so that they take no memory."""

    def begin(self, version: int) -> bool:
        """Return whether to add the deltas that lead to a version; until `end`, some are added and some are not.

        Raises an error, which ends the job, if they do not fit the tensors.
        """

    def add(self, name: str, first: int, values: torch.Tensor) -> None:
        """Add to a tensor's elements from `first` on, in row-major order."""

    def end(self, version: int) -> None:
        """All deltas that lead to the version are added."""


@dataclass(eq=False)
class TensorEndpoint:
    """What a process does with the tensors of its job.

    It sends them in pieces of `piece_size` bytes. Those that it receives are kept in `files` if there are any, as
    `StoredTensor`, else in `memory`, where a `Delta` is added to `deltas` if that is set: it is then received as a
    tensor without elements, on the device `meta`.
    """

    piece_size: int = MAX_PIECE
    deltas: DeltaSum | None = None
    files: ReusedFiles | None = None
    memory: ReusedMemory = field(default_factory=ReusedMemory)

    def adapt_to(self, piece_size: int) -> None:
        """Send in pieces no larger than those of a peer, which knows how many of them are on their way to it."""
        self.piece_size = min(self.piece_size, max(piece_size, _MIN_PIECE))
