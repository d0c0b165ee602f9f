"""Reader of the weights of Megatron-core archives: a torch distributed checkpoint, read tensor by tensor.

`.metadata` is a pickle that describes the tensors and their locations; nothing that it names is imported. Each
piece of a tensor is a small torch checkpoint inside a `.distcp` file.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from fedsft_assets.model.archive.members import Archive, Member
from fedsft_assets.model.archive.safe_pickle import OpaqueObject, SafeCallable, read_pickle
from fedsft_assets.model.archive.torch_reader import DTYPES, TensorFile, TensorInfo, read_size
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.megatron.dist_checkpoint_writer import FOLDER

METADATA = f"{FOLDER}/.metadata"

_MAX_METADATA_BYTES = 64 << 20
_MAX_PIECES = 50_000
_MAX_PIECES_PER_TENSOR = 2048
_OPAQUE_CLASSES = (
    *("torch.distributed.checkpoint.", "torch.distributed._shard.", "megatron.core.dist_checkpointing."),
    *("torch.serialization._get_layout", "pathlib.", "_io.BytesIO", "_codecs.encode"),
)
_DTYPES = {str(dtype): dtype for dtype in DTYPES}


@dataclass(frozen=True)
class _Piece:
    """A block of a tensor with these `offsets` and `sizes`: the `length` bytes of `member` that begin at `start`."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    member: Member
    start: int
    length: int


class DistributedTensors:
    """The tensors of a Megatron-core archive, with the interface of TensorFile."""

    def __init__(self, source: Archive, max_pieces_per_tensor: int = _MAX_PIECES_PER_TENSOR) -> None:
        """Read the description. Raises ModelError unless it locates every value exactly once."""
        self._where = f"{source.path}: {METADATA}"
        content = read_pickle(source.content(METADATA, _MAX_METADATA_BYTES), self._where, _find_global)
        if not isinstance(content, OpaqueObject) or not isinstance(content.field("state_dict_metadata"), dict):
            raise ModelError(f"{self._where}: is not the metadata of a distributed checkpoint")
        stored = self._stored(content.field("storage_data"))
        self.tensors: dict[str, TensorInfo] = {}
        self.non_tensors: dict[str, str] = {}
        self.shared: dict[str, str] = {}
        self._pieces: dict[str, list[_Piece]] = {}
        remaining = _MAX_PIECES
        for name, value in content.field("state_dict_metadata").items():
            if not isinstance(name, str) or not isinstance(value, OpaqueObject):
                raise ModelError(f"{self._where}: {str(name)[:200]}: is not a tensor's metadata")
            if not value.class_name.endswith(".TensorStorageMetadata"):
                self.non_tensors[name] = value.class_name.rpartition(".")[2]
                continue
            self.tensors[name] = info = self._info(name, value)
            chunks = value.field("chunks")
            remaining -= len(chunks) if isinstance(chunks, list) else 0
            if not isinstance(chunks, list) or len(chunks) > max_pieces_per_tensor or remaining < 0:
                raise ModelError(f"{self._where}: {name}: has no pieces, or more than {max_pieces_per_tensor}")
            self._pieces[name] = [self._piece(source, name, info, chunk, stored) for chunk in chunks]
            self._require_complete(name, info)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A copy of one tensor, or of its rows from `rows[0]` up to but excluding `rows[1]`."""
        info = self.tensors[name]
        if not info.shape:
            return self._read_piece(name, self._pieces[name][0], None)
        first, end = rows or (0, info.shape[0])
        found = [
            (piece, max(first, piece.offsets[0]), min(end, piece.offsets[0] + piece.sizes[0]))
            for piece in self._pieces[name]
        ]
        found = [(piece, start, stop) for piece, start, stop in found if start < stop]
        shape = (end - first, *info.shape[1:])
        if len(found) == 1:
            piece, start, stop = found[0]
            return self._read_piece(name, piece, (start - piece.offsets[0], stop - piece.offsets[0])).view(shape)
        whole = torch.empty(shape, dtype=info.dtype)
        for piece, start, stop in found:
            inner = [slice(at, at + size) for at, size in zip(piece.offsets[1:], piece.sizes[1:], strict=True)]
            part = self._read_piece(name, piece, (start - piece.offsets[0], stop - piece.offsets[0]))
            whole[(slice(start - first, stop - first), *inner)] = part
        return whole

    def _read_piece(self, name: str, piece: _Piece, rows: tuple[int, int] | None) -> Tensor:
        where = f"{piece.member.name} at {piece.start}: {name}"
        with TensorFile(piece.member.open(piece.start, piece.length), where) as file:
            expected = TensorInfo(self.tensors[name].dtype, piece.sizes)
            if file.tensors.get("") != expected:
                raise ModelError(f"{where}: expected {expected}, found {file.tensors.get('')}")
            return file.read("", rows)

    def _stored(self, storage: Any) -> dict[tuple[str, tuple[int, ...]], OpaqueObject]:
        """The locations of pieces, by the tensor's name and the piece's offsets."""
        if not isinstance(storage, dict):
            raise ModelError(f"{self._where}: storage_data: is not a mapping of locations")
        stored = {}
        for index, location in storage.items():
            if not isinstance(index, OpaqueObject) or not isinstance(location, OpaqueObject):
                raise ModelError(f"{self._where}: storage_data: is not a mapping of locations")
            name, offset = index.field("fqn"), index.field("offset")
            if isinstance(name, str) and (offset is None or isinstance(offset, tuple)):
                stored[name, offset or ()] = location
        return stored

    def _info(self, name: str, value: OpaqueObject) -> TensorInfo:
        properties = value.field("properties")
        state = properties.state if isinstance(properties, OpaqueObject) else None
        dtype = state[0] if isinstance(state, tuple) and state else None
        if isinstance(state, dict):
            dtype = state.get("dtype")
        if not isinstance(dtype, torch.dtype):
            raise ModelError(f"{self._where}: {name}: its dtype is not one of {', '.join(_DTYPES)}")
        return TensorInfo(dtype, self._sizes(name, value.field("size")))

    def _sizes(self, name: str, value: Any) -> tuple[int, ...]:
        if not isinstance(value, tuple) or any(type(size) is not int or size < 0 for size in value):
            raise ModelError(f"{self._where}: {name}: has no sizes")
        return value

    def _piece(
        self,
        source: Archive,
        name: str,
        info: TensorInfo,
        chunk: Any,
        stored: Mapping[tuple[str, tuple[int, ...]], OpaqueObject],
    ) -> _Piece:
        if not isinstance(chunk, OpaqueObject):
            raise ModelError(f"{self._where}: {name}: has no pieces")
        offsets, sizes = self._sizes(name, chunk.field("offsets")), self._sizes(name, chunk.field("sizes"))
        inside = len(offsets) == len(sizes) == len(info.shape) and all(
            at + size <= whole for at, size, whole in zip(offsets, sizes, info.shape, strict=True)
        )
        location = stored.get((name, offsets))
        if not inside or location is None:
            raise ModelError(f"{self._where}: {name}: the piece at {offsets} is outside of the tensor, or missing")
        file, start, length = (location.field(field) for field in ("relative_path", "offset", "length"))
        # The name is only looked up among the archive's members, never used as a path.
        member = source.members.get(f"{FOLDER}/{file}") if isinstance(file, str) else None
        if member is None:
            raise ModelError(f"{self._where}: {name}: is in {str(file)[:200]!r}, which is not a file of {FOLDER}/")
        if type(start) is not int or type(length) is not int or not 0 <= start <= start + length <= member.size:
            raise ModelError(f"{self._where}: {name}: is outside of {member.name}, which has {member.size} bytes")
        if location.field("transform_descriptors"):
            raise ModelError(f"{self._where}: {name}: is transformed by {location.field('transform_descriptors')!r}")
        if prod(sizes) * info.dtype.itemsize > length:
            raise ModelError(f"{self._where}: {name}: {sizes} of {info.dtype} need more than its {length} bytes")
        return _Piece(offsets, sizes, member, start, length)

    def _require_complete(self, name: str, info: TensorInfo) -> None:
        """Raise ModelError if pieces overlap, or do not have as many values as the tensor."""
        pieces = self._pieces[name]
        if sum(prod(piece.sizes) for piece in pieces) != prod(info.shape) or any(_overlaps(pieces)):
            raise ModelError(f"{self._where}: {name}: its pieces do not cover the tensor exactly once")


def _overlaps(pieces: list[_Piece]) -> Iterator[bool]:
    # In sorted order, a piece cannot overlap those that begin after its end along the first dimension.
    pieces = sorted(pieces, key=lambda piece: piece.offsets)
    for index, one in enumerate(pieces):
        for other in pieces[index + 1 :]:
            if one.offsets and other.offsets[0] >= one.offsets[0] + one.sizes[0]:
                break
            yield all(
                max(a, b) < min(a + n, b + m)
                for a, n, b, m in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
            )


def _find_global(name: str) -> object | None:
    if name == "torch.Size":
        return SafeCallable(read_size)
    if name == "collections.OrderedDict":
        return SafeCallable(OrderedDict[str, Any])
    if name in _DTYPES:
        return _DTYPES[name]
    return OpaqueObject.constructor(name) if name.startswith(_OPAQUE_CLASSES) else None
