"""Reader of untrusted torch checkpoints (the zip files of `torch.save`), one tensor at a time.

Only tensor descriptions are unpickled, and nothing is memory-mapped: peak memory is one tensor.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO, NamedTuple, Self

import torch
from torch import Tensor

from fedsft_assets.model.archive.members import Member
from fedsft_assets.model.archive.safe_pickle import OpaqueObject, SafeCallable, read_pickle
from fedsft_assets.model.archive.zip_entries import zip_entries
from fedsft_assets.model.errors import ModelError

_MAX_PICKLE_BYTES = 32 << 20
_MAX_TENSORS = 100_000
_MAX_DIMENSIONS = 16
_MAX_DEPTH = 32
_BLOCK = 16 << 20
_LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"

_STORAGE_DTYPES = {
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
DTYPES = tuple(_STORAGE_DTYPES.values())
STORAGE_CLASSES = {dtype: name.removeprefix("torch.") for name, dtype in _STORAGE_DTYPES.items()}


class TensorInfo(NamedTuple):
    """The dtype and shape of a tensor, without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * prod(self.shape)


def dtype_names(infos: Iterable[TensorInfo]) -> tuple[str, ...]:
    """The distinct dtypes of tensors, sorted by name: `float16`, `float32`."""
    return tuple(sorted({str(info.dtype).removeprefix("torch.") for info in infos}))


class TensorFile:
    """A checkpoint of named tensors, open for reading them one at a time.

    `tensors` describes all of them in file order, those in nested dictionaries as `outer.inner`; `shared` maps
    a name to the first name of the same tensor; `non_tensors` has the type names of all other values. A
    checkpoint that is a single tensor has it under the name "".
    """

    def __init__(self, file: BinaryIO, where: str, max_pickle_bytes: int = _MAX_PICKLE_BYTES) -> None:
        """Read the description. `file` is the whole checkpoint, and the caller closes it; errors begin with `where`.

        Raises ModelError unless all tensors are in uncompressed storages and do not overlap.
        """
        self._file, self._where = file, where
        _refuse_legacy_format(file, where)
        entries = zip_entries(file, where)
        root = _root_folder(entries, where)
        self._storages = {
            name.removeprefix(f"{root}data/"): entry for name, entry in entries.items() if "/data/" in name
        }
        if (order := entries.get(f"{root}byteorder")) and (found := order.content(64, where)) != b"little":
            raise ModelError(f"{where}: byteorder: expected little, found {found!r}")
        description = entries[f"{root}data.pkl"].content(max_pickle_bytes, where)
        content = read_pickle(description, where, _SAFE_GLOBALS.get, self._persistent_load)
        self._tensors: dict[str, _Tensor] = {}
        self.non_tensors: dict[str, str] = {}
        for name, value in _flatten(content, where):
            if isinstance(value, _Tensor):
                self._require_inside_storage(name, value)
                self._tensors[name] = value
            else:
                self.non_tensors[name] = value.class_name if isinstance(value, OpaqueObject) else type(value).__name__
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
        """Whether two names refer to the same tensor."""
        return self.shared.get(name, name) == self.shared.get(other, other)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A contiguous copy of one tensor, or of its rows from `rows[0]` up to but excluding `rows[1]`."""
        tensor = self._tensors[name]
        itemsize, start = tensor.storage.dtype.itemsize, self._storages[tensor.storage.key].start
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
                    raise ModelError(f"{self._where}: truncated: {name} extends beyond the end of the file")
                block = block[count:]

    def _persistent_load(self, pid: Any) -> "_Storage":
        """The storage described by a torch persistent id."""
        match pid:
            case ("storage", torch.dtype() as dtype, str(key), str(), int(numel)) if numel >= 0:
                storage = _Storage(key, dtype, numel)
            case _:
                raise ValueError("a reference that is not a storage of numbers")
        entry = self._storages.get(key)
        if entry is None or numel * dtype.itemsize > entry.size:
            found = f"has {entry.size} bytes" if entry else "is missing"
            raise ValueError(f"storage {key[:40]!r} should have {numel} values of {dtype}, but {found}")
        return storage

    def _require_inside_storage(self, name: str, tensor: "_Tensor") -> None:
        if tensor.offset + tensor.span > tensor.storage.numel or prod(tensor.shape) > max(tensor.span, 1):
            raise ModelError(
                f"{self._where}: {name}: shape {tensor.shape} with strides {tensor.stride} and offset {tensor.offset}"
                f" does not fit into its storage of {tensor.storage.numel} values"
            )

    def _refuse_overlaps(self, distinct: Mapping["_Tensor", str]) -> None:
        """Refuse tensors that together exceed their storage, with which a small file could describe huge tensors."""
        bytes_of: dict[str, int] = {}
        for tensor, name in distinct.items():
            key = tensor.storage.key
            bytes_of[key] = bytes_of.get(key, 0) + prod(tensor.shape) * tensor.storage.dtype.itemsize
            if bytes_of[key] > self._storages[key].size:
                raise ModelError(f"{self._where}: {name}: overlaps other tensors in storage {key}")


@dataclass(frozen=True)
class _Storage:
    """An entry of the zip file: a flat array of numbers that tensors are views of."""

    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class _Tensor:
    """A view of a storage; offset and strides are in values, as in torch."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def span(self) -> int:
        """Number of values in the storage from the view's first to its last, inclusive."""
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


def read_size(value: Any) -> tuple[int, ...]:
    """Validate the arguments of a pickled `torch.Size`, or strides. Raises ValueError if no tensor can have them."""
    if not isinstance(value, tuple | list) or len(value) > _MAX_DIMENSIONS or not all(type(v) is int for v in value):
        raise ValueError("sizes that are not integers, or too many of them")
    if any(not 0 <= size < 1 << 62 for size in value):
        raise ValueError("sizes that are negative or too large")
    return tuple(value)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _Tensor:
    shape, stride, (offset,) = read_size(shape), read_size(stride), read_size((offset,))
    if not isinstance(storage, _Storage) or len(shape) != len(stride):
        raise ValueError("a tensor without a storage, or with another number of strides than dimensions")
    return _Tensor(storage, offset, shape, stride)


def _rebuild_parameter(tensor: Any, *_: Any) -> _Tensor:
    if not isinstance(tensor, _Tensor):
        raise ValueError("a parameter that is not a tensor")
    return tensor


_SAFE_GLOBALS: dict[str, object] = {
    **_STORAGE_DTYPES,
    "collections.OrderedDict": SafeCallable(OrderedDict[str, Any]),
    "torch._utils._rebuild_tensor_v2": SafeCallable(_rebuild_tensor),
    "torch._utils._rebuild_parameter": SafeCallable(_rebuild_parameter),
    "torch.Size": SafeCallable(read_size),
    # Transformer Engine's fp8 states: bytes, which stay opaque.
    "_io.BytesIO": OpaqueObject.constructor("BytesIO"),
    "_codecs.encode": OpaqueObject.constructor("bytes"),
}


def _flatten(content: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Names and values of nested dictionaries. Their number is limited, as one dictionary may be nested repeatedly."""
    if isinstance(content, _Tensor):
        yield "", content
        return
    if not isinstance(content, dict):
        raise ModelError(f"{where}: expected tensors by name, found a {type(content).__name__}")
    pending, visited = [("", content, 0)], 0
    seen: set[str] = set()
    while pending:
        prefix, values, depth = pending.pop()
        visited += 1
        inner = []
        for key, value in values.items():
            name = f"{prefix}{key}"
            if isinstance(value, dict) and depth < _MAX_DEPTH:
                inner.append((f"{name}.", value, depth + 1))
                continue
            if name in seen or len(seen) >= _MAX_TENSORS or isinstance(value, dict) or not isinstance(key, str | int):
                raise ModelError(
                    f"{where}: {name[:200]}: is a duplicate, nested too deeply, or one of more than {_MAX_TENSORS}"
                )
            seen.add(name)
            yield name, value
        if visited + len(pending) + len(inner) > _MAX_TENSORS:
            raise ModelError(f"{where}: has more than {_MAX_TENSORS} dictionaries")
        pending += reversed(inner)


def _refuse_legacy_format(file: BinaryIO, where: str) -> None:
    file.seek(0)
    if file.read(len(_LEGACY_MAGIC)) == _LEGACY_MAGIC:
        raise ModelError(
            f"{where}: was written by torch before 1.6, or without its zip format; load it with torch and save it again"
        )


def _root_folder(entries: Mapping[str, Member], where: str) -> str:
    """The zip file's root folder, with a slash at the end."""
    found = [name.removesuffix("data.pkl") for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(found) != 1 or any(not name.startswith(found[0]) for name in entries):
        raise ModelError(f"{where}: expected the single folder of a torch checkpoint, found {sorted(entries)[:3]}")
    return found[0]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A view of the bytes of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
