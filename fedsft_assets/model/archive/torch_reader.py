"""Torch checkpoints (the zip files of `torch.save`), read one tensor at a time.

Nothing is unpickled but descriptions of tensors, and nothing is mapped into memory: a reader needs
the memory of the one tensor that it holds. Files may come from anyone.
"""

import io
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO, NamedTuple, Self

import torch
from torch import Tensor

from fedsft_assets.model.archive.file_window import FileWindow
from fedsft_assets.model.archive.safe_pickle import Maker, OpaqueObject, read_pickle
from fedsft_assets.model.errors import ModelError

_LARGEST_PICKLE = 32 << 20
_LARGEST_DIRECTORY = 64 << 20
_MOST_TENSORS = 100_000
_MOST_DIMENSIONS = 16
_DEEPEST = 32
_BLOCK = 16 << 20
_MAGIC_OF_OLD_FILES = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"

_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
TYPES = tuple(_STORAGES.values())
STORAGE_OF = {dtype: name.removeprefix("torch.") for name, dtype in _STORAGES.items()}


class TensorInfo(NamedTuple):
    """What a tensor is, without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * prod(self.shape)


def type_names(infos: Iterable[TensorInfo]) -> tuple[str, ...]:
    """The types of tensors as a person reads them, each once, sorted: `float16`, `float32`."""
    return tuple(sorted({str(info.dtype).removeprefix("torch.") for info in infos}))


class TensorFile:
    """A checkpoint of named tensors, opened for reading them one by one.

    `tensors` are all of them in the file's order, in nested dictionaries as `outer.inner`; `shared` leads
    from a name to the first name of the same values; `others` says the types of values that are no
    tensors. A file of one tensor without a name has the name "".
    """

    def __init__(self, file: BinaryIO, where: str) -> None:
        """Read the description. `file` is the whole checkpoint, and stays the caller's; errors begin with `where`.

        Raises ModelError for anything but tensors that lie apart from each other in uncompressed storages.
        """
        self._file, self._where = file, where
        entries = _zip_entries(file, where)
        prefix = _prefix(entries, where)
        self._storages = {
            name.removeprefix(f"{prefix}data/"): entry for name, entry in entries.items() if "/data/" in name
        }
        order = entries.get(f"{prefix}byteorder")
        if order and self._small(order) != b"little":
            raise ModelError(f"{where}: byteorder: expected little, found {self._small(order)[:20]!r}")
        content = read_pickle(
            self._small(entries[f"{prefix}data.pkl"], _LARGEST_PICKLE), where, _known, self._described_storage
        )
        self._tensors: dict[str, _Tensor] = {}
        self.others: dict[str, str] = {}
        for name, value in _flatten(content, where):
            if isinstance(value, _Tensor):
                self._check(name, value)
                self._tensors[name] = value
            else:
                self.others[name] = value.kind if isinstance(value, OpaqueObject) else type(value).__name__
        self.tensors = {name: TensorInfo(tensor.storage.dtype, tensor.shape) for name, tensor in self._tensors.items()}
        first: dict[_Tensor, str] = {}
        self.shared = {
            name: first[tensor] for name, tensor in self._tensors.items() if first.setdefault(tensor, name) != name
        }
        self._refuse_overlaps(first)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.clear()

    def share(self, name: str, other: str) -> bool:
        """Whether two names have the same values because they are the same ones."""
        return self.shared.get(name, name) == self.shared.get(other, other)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """One tensor, or its rows from the first to before the second, contiguous and in memory of its own."""
        tensor = self._tensors[name]
        itemsize, start = tensor.storage.dtype.itemsize, self._storages[tensor.storage.key].offset
        if tensor.contiguous:
            shape, offset = tensor.shape, tensor.offset
            if rows:
                shape, offset = (rows[1] - rows[0], *shape[1:]), offset + rows[0] * prod(shape[1:])
            values = torch.empty(shape, dtype=tensor.storage.dtype)
            self._fill(values, start + offset * itemsize, name)
            return values
        span = torch.empty(tensor.span, dtype=tensor.storage.dtype)
        self._fill(span, start + tensor.offset * itemsize, name)
        values = span.as_strided(tensor.shape, tensor.stride)
        return (values[slice(*rows)] if rows else values).clone(memory_format=torch.contiguous_format)

    def _fill(self, values: Tensor, offset: int, name: str) -> None:
        target = tensor_bytes(values)
        self._file.seek(offset)
        for start in range(0, len(target), _BLOCK):
            block = target[start : start + _BLOCK]
            while block:
                count = self._file.readinto(block)  # type: ignore[attr-defined]
                if not count:
                    raise ModelError(f"{self._where}: truncated: {name} ends after the file does")
                block = block[count:]

    def _small(self, entry: "_Entry", most: int = 64) -> bytes:
        if entry.size > most:
            raise ModelError(f"{self._where}: {entry.name} has {entry.size} bytes, more than {most}")
        content = bytearray(entry.size)
        self._file.seek(entry.offset)
        if self._file.readinto(content) != entry.size:  # type: ignore[attr-defined]
            raise ModelError(f"{self._where}: truncated: {entry.name} ends after the file does")
        return bytes(content)

    def _described_storage(self, pid: Any) -> "_Storage":
        match pid:
            case ("storage", torch.dtype() as dtype, str(key), str(), int(numel)) if numel >= 0:
                storage = _Storage(key, dtype, numel)
            case _:
                raise ValueError("a reference that is no storage of numbers")
        entry = self._storages.get(key)
        if entry is None or numel * dtype.itemsize > entry.size:
            found = f"has {entry.size} bytes" if entry else "is not there"
            raise ValueError(f"storage {key[:40]!r} should have {numel} values of {dtype}, but {found}")
        return storage

    def _check(self, name: str, tensor: "_Tensor") -> None:
        if tensor.offset + tensor.span > tensor.storage.numel or prod(tensor.shape) > max(tensor.span, 1):
            raise ModelError(
                f"{self._where}: {name}: shape {tensor.shape} with strides {tensor.stride} from {tensor.offset} on"
                f" does not fit into its storage of {tensor.storage.numel} values"
            )

    def _refuse_overlaps(self, distinct: Mapping["_Tensor", str]) -> None:
        """A small file must not describe more values than it has."""
        bytes_of: dict[str, int] = {}
        for tensor, name in distinct.items():
            key = tensor.storage.key
            bytes_of[key] = bytes_of.get(key, 0) + prod(tensor.shape) * tensor.storage.dtype.itemsize
            if bytes_of[key] > self._storages[key].size:
                raise ModelError(f"{self._where}: {name}: overlaps other tensors in storage {key}")


@dataclass(frozen=True)
class _Entry:
    """One entry of a zip file: where its bytes begin, and how many they are."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def span(self) -> int:
        """Values from the first to the last one."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def contiguous(self) -> bool:
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return False
            expected *= size
        return True


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > _MOST_DIMENSIONS or not all(type(v) is int for v in value):
        raise ValueError("sizes that are no tuple of integers")
    if any(not 0 <= size < 1 << 62 for size in value):
        raise ValueError("sizes below zero or beyond reason")
    return value


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _Tensor:
    shape, stride, (offset,) = _sizes(shape), _sizes(stride), _sizes((offset,))
    if not isinstance(storage, _Storage) or len(shape) != len(stride):
        raise ValueError("a tensor without a storage, or with strides of other dimensions")
    return _Tensor(storage, offset, shape, stride)


def _parameter(tensor: Any, *_: Any) -> _Tensor:
    if not isinstance(tensor, _Tensor):
        raise ValueError("a parameter that is no tensor")
    return tensor


_NAMES: dict[str, object] = {
    **_STORAGES,
    "collections.OrderedDict": Maker(OrderedDict[str, Any]),
    "torch._utils._rebuild_tensor_v2": Maker(_tensor),
    "torch._utils._rebuild_parameter": Maker(_parameter),
    "torch.Size": Maker(_sizes),
    # The states that layers of Transformer Engine keep for fp8: bytes, which nothing here opens.
    "_io.BytesIO": OpaqueObject.maker("BytesIO"),
    "_codecs.encode": OpaqueObject.maker("bytes"),
}
_known = _NAMES.get


def _flatten(content: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Names and values of nested dictionaries; at most so many, since a dictionary may be there many times."""
    if isinstance(content, _Tensor):
        yield "", content
        return
    if not isinstance(content, dict):
        raise ModelError(f"{where}: expected tensors by name, found a {type(content).__name__}")
    left, visited = [("", content, 0)], 0
    seen: set[str] = set()
    while left:
        prefix, values, depth = left.pop()
        visited += 1
        inner = []
        for key, value in values.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict) and depth < _DEEPEST:
                inner.append((f"{name}.", value, depth + 1))
                continue
            if name in seen or len(seen) >= _MOST_TENSORS or isinstance(value, dict) or not isinstance(key, str | int):
                raise ModelError(
                    f"{where}: {name[:200]}: is there twice, too deep, or one of more than {_MOST_TENSORS}"
                )
            seen.add(name)
            yield name, value
        if visited + len(left) + len(inner) > _MOST_TENSORS:
            raise ModelError(f"{where}: has more than {_MOST_TENSORS} dictionaries")
        left += reversed(inner)


def _zip_entries(file: BinaryIO, where: str) -> dict[str, _Entry]:
    file.seek(0)
    if file.read(len(_MAGIC_OF_OLD_FILES)) == _MAGIC_OF_OLD_FILES:
        raise ModelError(
            f"{where}: was written by torch before 1.6, or without its zip format; load it with torch, and save it anew"
        )
    size = file.seek(0, io.SEEK_END)
    try:
        with zipfile.ZipFile(FileWindow(file, 0, size, most=_LARGEST_DIRECTORY)) as archive:
            infos, end = archive.infolist(), archive.start_dir
    # NotImplementedError is zipfile's word for a later version of the format than it reads.
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError) as error:
        raise ModelError(f"{where}: is truncated, or no checkpoint of torch: {error}") from error
    entries: dict[str, _Entry] = {}
    for info in infos:
        if info.filename in entries:
            raise ModelError(f"{where}: {info.filename!r} is there twice")
        entries[info.filename] = _entry(file, info, end, where)
    following = 0
    for entry in sorted(entries.values(), key=lambda entry: entry.offset):
        if entry.offset < following:
            raise ModelError(f"{where}: {entry.name!r} overlaps another entry")
        following = entry.offset + entry.size
    return entries


def _entry(file: BinaryIO, info: zipfile.ZipInfo, end: int, where: str) -> _Entry:
    """Where an entry's bytes are, according to its own header, which must agree with the directory."""
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1 or info.file_size != info.compress_size:
        raise ModelError(f"{where}: {info.filename!r} is compressed or encrypted; torch writes neither")
    if not 0 <= info.header_offset <= end - 30:
        raise ModelError(f"{where}: {info.filename!r} begins outside the file")
    file.seek(info.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\3\4":
        raise ModelError(f"{where}: {info.filename!r} is not where the directory says")
    name_length, extra_length = struct.unpack_from("<2H", header, 26)
    if file.read(name_length) != info.orig_filename.encode():
        raise ModelError(f"{where}: {info.filename!r} has another name where it begins")
    offset = info.header_offset + 30 + name_length + extra_length
    if offset + info.file_size > end:
        raise ModelError(f"{where}: {info.filename!r} ends outside the file")
    return _Entry(info.filename, offset, info.file_size)


def _prefix(entries: Mapping[str, _Entry], where: str) -> str:
    found = [name.removesuffix("data.pkl") for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(found) != 1 or any(not name.startswith(found[0]) for name in entries):
        raise ModelError(f"{where}: expected the one folder of a torch checkpoint, found {sorted(entries)[:3]}")
    return found[0]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in main memory, not a copy."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
