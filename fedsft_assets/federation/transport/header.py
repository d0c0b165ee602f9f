"""A stream of tensors: what it says of itself before its first piece, and of what size its pieces are.

It needs torch and pydantic only.
"""

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import accumulate
from math import prod
from typing import Annotated, Self

import torch
from pydantic import BaseModel, ConfigDict, Field

LARGEST_PIECE = 10 << 20  # bytes; pieces of so many are what NVFlare sends as they lie in memory
LARGEST_GAP = 4096  # bytes between tensors that lie together, which travel with them
_SMALLEST_PIECE = 1 << 20

_piece = LARGEST_PIECE


def piece_size() -> int:
    """Bytes of the pieces that this process sends."""
    return _piece


def send_pieces_of(size: int) -> None:
    """Send in pieces of so many bytes from now on, or what is nearest."""
    global _piece  # noqa: PLW0603 one for the process, as NVFlare's decomposers are
    _piece = min(max(size, _SMALLEST_PIECE), LARGEST_PIECE)


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a stream. `added` is to what it is to be added; `gap` are bytes before it that mean nothing."""

    name: str
    dtype: str
    shape: list[int]
    added: tuple[str, int] | None
    gap: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * dtype_of(self.dtype).itemsize


_Size = Annotated[int, Field(ge=0, le=2**53)]


class _Said(BaseModel):
    """`Contents` as they travel."""

    model_config = ConfigDict(strict=True, extra="forbid")

    piece: Annotated[int, Field(ge=1, le=LARGEST_PIECE)]
    tensors: list[tuple[str, str, list[_Size], tuple[str, _Size] | None, _Size]]


class Contents:
    """What a stream has: tensors one after the other, and where in it each of them begins and ends.

    `piece` is the size of its pieces in bytes.
    """

    def __init__(self, tensors: Sequence[TensorHeader], piece: int) -> None:
        self.tensors, self.piece = tensors, piece
        self.ends = list(accumulate(one.gap + one.nbytes for one in tensors))
        self.starts = [end - one.nbytes for end, one in zip(self.ends, tensors, strict=True)]
        self.total = self.ends[-1] if tensors else 0

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Raises ValueError for what no sender of this package says."""
        said = _Said.model_validate_json(content)
        contents = cls([TensorHeader(*one) for one in said.tensors], said.piece)
        names = [one.name for one in contents.tensors]
        if len(set(names)) < len(names):
            raise ValueError("a tensor is there twice")
        for one in contents.tensors:
            dtype_of(one.dtype)
        return contents

    def to_bytes(self) -> bytes:
        return json.dumps({"piece": self.piece, "tensors": [astuple(one) for one in self.tensors]}).encode()

    def at(self, position: int) -> int:
        """Which tensor has the byte at a position, or the gap before it."""
        return bisect_right(self.ends, position)


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor; the very memory of one that lies there without gaps."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def dtype_of(name: str) -> torch.dtype:
    """Of the name that `str` gives it. Raises ValueError for what is none."""
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is no type of a tensor")
    return dtype
