"""Writer of Megatron-core's distributed checkpoints, as a folder of files inside an archive.

The format is torch's (`torch.distributed.checkpoint`), with the additions of `megatron.core.dist_checkpointing`.
Only one piece of a tensor is in memory at a time; neither Megatron nor a process group is needed.
"""

import json
import pickle
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

FOLDER = "model_weights"

_DATA = "__0_0.distcp"
# What `megatron.core.dist_checkpointing` 0.13 writes and checks.
_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Piece:
    """A tensor of a checkpoint, or, if `row` is set, one row of it; `shape` is that of the whole tensor.

    `read` returns the values of the piece; those of a row may lack the first dimension.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    row: int | None
    read: Callable[[], Tensor]

    @property
    def offsets(self) -> tuple[int, ...]:
        return (self.row or 0, *(0 for _ in self.shape[1:]))

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.shape if self.row is None else (1, *self.shape[1:])


def write_checkpoint(
    file: BinaryIO,
    member: Callable[[str], AbstractContextManager[None]],
    pieces: Iterable[Piece],
    empty_objects: Iterable[str],
) -> None:
    """Write the checkpoint's files to `file`, each within a block of `member`, called with the file's name.

    `empty_objects` are names of empty states that Megatron's layers have.
    """
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    described: dict[str, Any] = {}
    stored: dict[MetadataIndex, _StorageInfo] = {}
    with member(f"{FOLDER}/{_DATA}"):
        start = file.tell()

        def store(index: MetadataIndex, content: object) -> None:
            before = file.tell()
            torch.save(content, file)
            stored[index] = _StorageInfo(_DATA, before - start, file.tell() - before)

        for piece in pieces:
            values = piece.read().reshape(piece.sizes).contiguous()
            if values.untyped_storage().nbytes() != values.nbytes:
                values = values.clone()  # torch would save the whole tensor that this is a view of
            whole = described.setdefault(
                piece.name,
                TensorStorageMetadata(TensorProperties(dtype=piece.dtype), torch.Size(piece.shape), chunks=[]),
            )
            whole.chunks.append(ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes)))
            store(MetadataIndex(piece.name, torch.Size(piece.offsets)), values)
            del values
        tensors = list(described)
        for name in empty_objects:
            described[name] = BytesStorageMetadata()
            store(MetadataIndex(name), [None])
    metadata = Metadata(state_dict_metadata=described, planner_data=None, storage_data=stored)
    # Megatron records flattened tensors here; there are none.
    metadata.mcore_data = {name: {} for name in tensors}  # type: ignore[attr-defined]
    with member(f"{FOLDER}/.metadata"):
        pickle.dump(metadata, file)
    with member(f"{FOLDER}/common.pt"):
        torch.save({}, file)
    with member(f"{FOLDER}/metadata.json"):
        file.write(json.dumps(_BACKENDS).encode())
