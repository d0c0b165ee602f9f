"""Tensor types that determine how a tensor is sent."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping

import torch


class OutgoingTensor(torch.Tensor):
    """A tensor with its own way of being sent, received as a plain tensor. Operations on it return plain tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property  # type: ignore[misc]
    def __class__(self) -> type[torch.Tensor]:  # type: ignore[override]
        """`torch.Tensor`: NVFlare sends the name of this class, and the receiver instantiates it.

        NVFlare's own processes in between reject classes that are not registered with them.
        """
        return torch.Tensor


class LazyTensor(OutgoingTensor):
    """A tensor without storage, on the device `meta`, whose elements are computed piece by piece when sent.

    `make(first, last)` returns the flattened elements [first, last) in row-major order, shape [last - first]. It may be
    called repeatedly for the same elements and must return the same values.
    """

    make: Callable[[int, int], torch.Tensor]

    @staticmethod
    def __new__(
        cls: type[LazyTensor],
        shape: tuple[int, ...],
        dtype: torch.dtype,
        make: Callable[[int, int], torch.Tensor],
    ) -> LazyTensor:
        tensor = torch.Tensor._make_subclass(cls, torch.empty(shape, dtype=dtype, device="meta"))
        tensor.make = make
        return tensor


class Delta(OutgoingTensor):
    """A tensor that a receiver with a `DeltaSum` adds to its tensor named `target`.

    `version` is that of the receiver's tensors afterwards; it is the same for all deltas of a message.
    """

    target: str
    version: int

    @staticmethod
    def __new__(cls: type[Delta], tensor: torch.Tensor, target: str, version: int) -> Delta:
        delta = torch.Tensor._make_subclass(cls, tensor)
        delta.target, delta.version = target, version
        return delta


class ContiguousTensors(Mapping[str, torch.Tensor]):
    """Named tensors in one memory block, such as a mapped file, that are sent in their memory layout.

    Small tensors then need no copy, however many receivers there are. Padding bytes between two tensors may be sent
    along: use it only if receivers may see them.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        filled = [tensor for tensor in tensors.values() if tensor.nbytes]
        self._tensors = dict(tensors)
        if filled:
            block = MemoryBlock(filled)
            self._tensors |= {name: BlockTensor(one, block) for name, one in tensors.items() if one.nbytes}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class BlockTensor(OutgoingTensor):
    """A tensor of `ContiguousTensors`, with the block that contains it."""

    block: MemoryBlock

    @staticmethod
    def __new__(cls: type[BlockTensor], tensor: torch.Tensor, block: MemoryBlock) -> BlockTensor:
        member = torch.Tensor._make_subclass(cls, tensor)
        member.block = block
        return member


class MemoryBlock:
    """The memory from the first to the last byte of some tensors; `content`, and any view of it, keeps it alive.

    `address` is the address of the first byte.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.address = min(tensor.data_ptr() for tensor in tensors)
        size = max(tensor.data_ptr() + tensor.nbytes for tensor in tensors) - self.address
        memory = (ctypes.c_ubyte * size).from_address(self.address)
        memory.storages = [tensor.untyped_storage() for tensor in tensors]  # type: ignore[attr-defined]
        self.content = memoryview(memory).cast("B")
