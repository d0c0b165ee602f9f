"""Tensors that also say how they are to be sent, each way a type of its own."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping

import torch


class OutgoingTensor(torch.Tensor):
    """A tensor that is sent in a way of its own, and received as a plain one. What is computed from it is plain too."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property  # type: ignore[misc]
    def __class__(self) -> type[torch.Tensor]:  # type: ignore[override]
        """`torch.Tensor`: NVFlare puts the name of this class on the wire, and the receiver makes one of that class.

        NVFlare's own processes in between refuse a class that is not registered with them.
        """
        return torch.Tensor


class LazyTensor(OutgoingTensor):
    """A tensor without memory, on the device `meta`, whose elements are made when they are sent, a piece at a time.

    `make(first, last)` returns the elements `first` to `last - 1` in row-major order, one-dimensional. It may be called
    more than once for the same elements, and must then return the same values.
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


def materialize(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with all its elements in memory; any but a `LazyTensor` is returned as it is."""
    return tensor.make(0, tensor.numel()).reshape(tensor.shape) if isinstance(tensor, LazyTensor) else tensor


class Delta(OutgoingTensor):
    """A tensor that a receiver with a `DeltaSum` adds to the tensor called `target` there.

    `version` is the one that the receiver's tensors have afterwards; all deltas of a message have the same.
    """

    target: str
    version: int

    @staticmethod
    def __new__(cls: type[Delta], tensor: torch.Tensor, target: str, version: int) -> Delta:
        delta = torch.Tensor._make_subclass(cls, tensor)
        delta.target, delta.version = target, version
        return delta


class ContiguousTensors(Mapping[str, torch.Tensor]):
    """Tensors by name that lie in one block of memory, such as a mapped file, and are sent as they lie there.

    Small tensors then need no copy, however many receivers there are. Bytes of the block between two tensors may be
    sent along with them: use it only where a receiver may see those.
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
    """One of `ContiguousTensors`, and the block that they all lie in."""

    block: MemoryBlock

    @staticmethod
    def __new__(cls: type[BlockTensor], tensor: torch.Tensor, block: MemoryBlock) -> BlockTensor:
        member = torch.Tensor._make_subclass(cls, tensor)
        member.block = block
        return member


class MemoryBlock:
    """The memory from the first byte of some tensors to the last; `content`, and any view of it, keeps it alive.

    `address` is that of the first byte.
    """

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.address = min(tensor.data_ptr() for tensor in tensors)
        size = max(tensor.data_ptr() + tensor.nbytes for tensor in tensors) - self.address
        memory = (ctypes.c_ubyte * size).from_address(self.address)
        memory.storages = [tensor.untyped_storage() for tensor in tensors]  # type: ignore[attr-defined]
        self.content = memoryview(memory).cast("B")
