"""Sequential writer of torch checkpoints (the zip files of `torch.save`), one tensor at a time."""

import struct
import zlib
from collections.abc import Callable, Mapping
from math import prod
from typing import BinaryIO

from torch import Tensor

from fedsft_assets.model.archive.torch_reader import STORAGE_CLASSES, TensorInfo, tensor_bytes
from fedsft_assets.model.errors import ModelError


def write_tensors(
    file: BinaryIO,
    tensors: Mapping[str, TensorInfo],
    read: Callable[[str], Tensor],
    shared: Mapping[str, str] | None = None,
    zip64_from: int = 0xFFFFFFFF,
) -> None:
    """Write a checkpoint for `torch.load(weights_only=True)`, sequentially, with one tensor in memory at a time.

    `shared` maps names in `tensors` to the names of the tensors that they share; `read` is called once for each
    of the others, in order. Equal tensors give equal bytes. Sizes and offsets from `zip64_from` on are written in the
    64-bit format. Raises ModelError if a tensor from `read` has
    another dtype or shape than described, or torch has no storage class for it.
    """
    shared = shared or {}
    keys = {name: str(index) for index, name in enumerate(name for name in tensors if name not in shared)}
    writer = _ZipWriter(file, "model_weights/", zip64_from)
    writer.add("data.pkl", memoryview(_pickle(tensors, keys, shared)))
    writer.add("byteorder", memoryview(b"little"))
    for name, key in keys.items():
        tensor = read(name)
        found = TensorInfo(tensor.dtype, tuple(tensor.shape))
        if found != tensors[name]:
            raise ModelError(f"{name}: expected {tensors[name]}, found {found}")
        writer.add(f"data/{key}", tensor_bytes(tensor.detach().cpu().contiguous()))
        del tensor
    writer.add("version", memoryview(b"3\n"))
    writer.finish()


def _pickle(tensors: Mapping[str, TensorInfo], keys: Mapping[str, str], shared: Mapping[str, str]) -> bytes:
    """The pickle (protocol 2) of an OrderedDict of tensors, as torch.save writes it."""
    parts = [b"\x80\x02ccollections\nOrderedDict\n)R("]
    for name, info in tensors.items():
        first = shared.get(name, name)
        if first not in keys or tensors[first] != info:
            raise ModelError(f"{name}: shares its values with {first}, which is missing or has another dtype or shape")
        if info.dtype not in STORAGE_CLASSES:
            raise ModelError(f"{name}: values of {info.dtype} cannot be written")
        strides = [prod(info.shape[axis + 1 :]) for axis in range(len(info.shape))]
        parts += [
            _string(name),
            b"ctorch._utils\n_rebuild_tensor_v2\n((",
            _string("storage"),
            f"ctorch\n{STORAGE_CLASSES[info.dtype]}\n".encode(),
            _string(keys[first]),
            _string("cpu"),
            _integer(prod(info.shape)),
            b"tQ",
            _integer(0),
            b"(" + b"".join(map(_integer, info.shape)) + b"t",
            b"(" + b"".join(map(_integer, strides)) + b"t",
            b"\x89ccollections\nOrderedDict\n)RtR",
        ]
    return b"".join([*parts, b"u."])


def _string(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _integer(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


class _ZipWriter:
    """Sequential writer of an uncompressed zip file; contents begin at multiples of 64 bytes, as torch aligns them."""

    _ALIGNMENT = 64

    def __init__(self, file: BinaryIO, prefix: str, zip64_from: int) -> None:
        self._file, self._prefix, self._zip64_from = file, prefix, zip64_from
        self._position = 0
        self._directory: list[bytes] = []

    def add(self, name: str, data: memoryview) -> None:
        encoded = f"{self._prefix}{name}".encode()
        size, crc, offset = len(data), zlib.crc32(data), self._position
        large, far = size >= self._zip64_from, offset >= self._zip64_from
        version = 45 if large or far else 20
        # Version, no flags, stored, 1 January 1980, CRC, both sizes, name length.
        common = struct.pack("<5H3LH", version, 0, 0, 0, 33, crc, *[0xFFFFFFFF if large else size] * 2, len(encoded))
        extra = struct.pack("<2H2Q", 1, 16, size, size) if large else b""
        # Padding is an extra field: a 4-byte header and the bytes up to the alignment.
        padding = -(offset + 30 + len(encoded) + len(extra) + 4) % self._ALIGNMENT
        extra += struct.pack("<2H", 0x4246, padding) + b"Z" * padding
        self._write(b"PK\3\4" + common + struct.pack("<H", len(extra)) + encoded + extra)
        self._write(data)
        wide = [size, size] * large + [offset] * far
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        location = struct.pack("<4HLL", len(extra), 0, 0, 0, 0, 0xFFFFFFFF if far else offset)
        self._directory.append(b"PK\1\2" + struct.pack("<H", version) + common + location + encoded + extra)

    def finish(self) -> None:
        start, count = self._position, len(self._directory)
        for entry in self._directory:
            self._write(entry)
        size, end = self._position - start, self._position
        if start >= self._zip64_from or count >= 0xFFFF:
            self._write(b"PK\6\6" + struct.pack("<Q2H2L4Q", 44, 45, 45, 0, 0, count, count, size, start))
            self._write(b"PK\6\7" + struct.pack("<LQL", 0, end, 1))
            start, count = 0xFFFFFFFF, 0xFFFF
        self._write(b"PK\5\6" + struct.pack("<4H2LH", 0, 0, count, count, min(size, 0xFFFFFFFF), start, 0))

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._position += len(data)
