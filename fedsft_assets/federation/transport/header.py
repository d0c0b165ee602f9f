"""The header of a tensor stream, sent before the first piece: the tensors and their positions.

Requires torch and pydantic only.
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

MAX_PIECE = 10 << 20  # bytes; NVFlare sends pieces of this size without copying them
MAX_GAP = 4096  # maximum bytes of padding between two tensors of a block that are sent along


@dataclass(frozen=True)
class TensorHeader:
    """One tensor of a stream.

    `delta` is set for a `Delta`: the name of the tensor to add it to, and the version of the sum. `gap` is the number
    of padding bytes before the tensor.
    """

    name: str
    dtype: str
    shape: list[int]
    delta: tuple[str, int] | None
    gap: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * dtype_named(self.dtype).itemsize


_Size = Annotated[int, Field(ge=0, le=2**53)]


class _WireHeader(BaseModel):
    """The JSON form of `StreamHeader`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    piece: Annotated[int, Field(ge=1, le=MAX_PIECE)]
    tensors: list[tuple[str, str, list[_Size], tuple[str, _Size] | None, _Size]]


class StreamHeader:
    """The tensors of a stream, in order, with the byte positions where each starts and ends.

    `piece_size` is in bytes; the last piece may be shorter.
    """

    def __init__(self, tensors: Sequence[TensorHeader], piece_size: int) -> None:
        self.tensors, self.piece_size = tensors, piece_size
        self.ends = list(accumulate(one.gap + one.nbytes for one in tensors))
        self.starts = [end - one.nbytes for end, one in zip(self.ends, tensors, strict=True)]
        self.total = self.ends[-1] if tensors else 0

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Raises ValueError for anything that this package would not send."""
        wire = _WireHeader.model_validate_json(content)
        header = cls([TensorHeader(*one) for one in wire.tensors], wire.piece)
        names = [one.name for one in header.tensors]
        if len(set(names)) < len(names):
            raise ValueError("a tensor is listed twice")
        return header

    def to_bytes(self) -> bytes:
        return json.dumps({"piece": self.piece_size, "tensors": [astuple(one) for one in self.tensors]}).encode()

    def index_at(self, position: int) -> int:
        """Index of the tensor at a byte position of the stream; a gap belongs to the tensor after it."""
        return bisect_right(self.ends, position)


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, uint8 [nbytes]: a view if it is contiguous and on the CPU, otherwise a copy."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def dtype_named(name: str) -> torch.dtype:
    """The dtype with this `str`, such as "torch.float32". Raises ValueError if there is none."""
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name!r} is not a dtype")
    return dtype
