"""Distributed checkpoints: what torch writes is read piece by piece, and metadata of strangers leads nowhere else."""

import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from fedsft_assets.model.archive.members import open_archive
from fedsft_assets.model.archive.torch_reader import TensorInfo
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.megatron.dist_checkpoint_reader import METADATA, DistributedTensors
from fedsft_assets_tests.model.megatron_archives import SETTINGS, distributed, members, write_folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """A distributed checkpoint of a few tensors, each in one piece."""
    torch.manual_seed(0)
    tensors = {"a": torch.arange(12.0).view(4, 3), "b": torch.randn(5).half(), "c": torch.tensor(2.5)}
    tensors |= {"left": torch.ones(2, 2), "right": torch.full((2, 3), 2.0), "below": torch.full((1, 5), 3.0)}
    return write_folder(tmp_path / "archive", {**members(SETTINGS), **distributed(tensors, tmp_path / "torch")})


@pytest.fixture
def change(folder) -> Callable[..., Path]:
    """Change the metadata as torch would read it, and write it again."""

    def make(how: Callable[[Metadata], object]) -> Path:
        metadata = pickle.loads((folder / METADATA).read_bytes())
        how(metadata)
        (folder / METADATA).write_bytes(pickle.dumps(metadata))
        return folder

    return make


def _read(folder: Path, name: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
    with open_archive(folder, folder) as source:
        return DistributedTensors(source).read(name, rows)


def test_every_tensor_is_read_as_it_was_written(folder):
    with open_archive(folder, folder) as source:
        tensors = DistributedTensors(source)
        assert tensors.tensors["a"] == TensorInfo(torch.float32, (4, 3))
        assert tensors.tensors["b"] == TensorInfo(torch.float16, (5,))
        assert torch.equal(tensors.read("a"), torch.arange(12.0).view(4, 3))
        assert torch.equal(tensors.read("a", (1, 3)), torch.arange(12.0).view(4, 3)[1:3])
        assert torch.equal(tensors.read("c"), torch.tensor(2.5))


def _joined(metadata: Metadata) -> None:
    """One tensor of shape (3, 5) in three pieces, as ranks of tensor parallelism write it."""
    places = {"left": (0, 0), "right": (0, 2), "below": (2, 0)}
    chunks = []
    for name, offsets in places.items():
        sizes = metadata.state_dict_metadata.pop(name).size
        chunks.append(ChunkStorageMetadata(torch.Size(offsets), sizes))
        place = metadata.storage_data.pop(MetadataIndex(name, torch.Size((0, 0))))
        metadata.storage_data[MetadataIndex("joined", torch.Size(offsets))] = place
    properties = TensorProperties(dtype=torch.float32)
    metadata.state_dict_metadata["joined"] = TensorStorageMetadata(properties, torch.Size((3, 5)), chunks)


def test_a_tensor_in_pieces_is_put_together(change):
    expected = torch.tensor([[1.0, 1, 2, 2, 2], [1, 1, 2, 2, 2], [3, 3, 3, 3, 3]])
    folder = change(_joined)
    assert torch.equal(_read(folder, "joined"), expected)
    assert torch.equal(_read(folder, "joined", (1, 3)), expected[1:3])
    assert torch.equal(_read(folder, "joined", (2, 3)), expected[2:])


def _place(**changes: Any) -> Callable[[Metadata], object]:
    def how(metadata: Metadata) -> None:
        index = MetadataIndex("a", torch.Size((0, 0)))
        metadata.storage_data[index] = replace(metadata.storage_data[index], **changes)

    return how


def _tensor(**changes: Any) -> Callable[[Metadata], object]:
    def how(metadata: Metadata) -> None:
        metadata.state_dict_metadata["a"] = replace(metadata.state_dict_metadata["a"], **changes)

    return how


def _chunk(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            _place(relative_path="../../../../etc/passwd"),
            r"is in '\.\./\.\./\.\./\.\./etc/passwd', which is not a file",
        ),
        (_place(relative_path="/etc/passwd"), "is in '/etc/passwd', which is not a file of model_weights/"),
        (_place(relative_path="../model_config.yaml"), "which is not a file of model_weights/"),
        (_place(relative_path=7), "is in '7', which is not a file"),
        (_place(offset=-1), r"is outside of model_weights/__0_0\.distcp"),
        (_place(offset=1 << 40), r"is outside of model_weights/__0_0\.distcp"),
        (_place(length=1 << 40), r"is outside of model_weights/__0_0\.distcp"),
        (_place(length=7), "need more than its 7 bytes"),
        (_place(offset=0.5), "is outside of"),
        (_place(transform_descriptors=["zstd"]), r"is transformed by \['zstd'\]"),
        (lambda m: m.storage_data.pop(MetadataIndex("a", torch.Size((0, 0)))), "is outside of the tensor, or missing"),
        (lambda m: setattr(m, "storage_data", None), "storage_data: is not a mapping of locations"),
        (_tensor(chunks=[]), "its pieces do not cover the tensor"),
        (_tensor(chunks=[_chunk((0, 0), (4, 3))] * 2), "its pieces do not cover the tensor"),
        (_tensor(chunks=[_chunk((0, 0), (3, 3))]), "its pieces do not cover the tensor"),
        (_tensor(chunks=[_chunk((0, 0), (5, 3))]), "is outside of the tensor"),
        (_tensor(chunks=[_chunk((0,), (4,))]), "is outside of the tensor"),
        (_tensor(chunks=None), "has no pieces"),
        (_tensor(size=torch.Size((1 << 50, 3))), "its pieces do not cover the tensor"),
        (_tensor(size="4x3"), "has no sizes"),
        (_tensor(properties=None), "its dtype is not one of"),
        (lambda m: m.state_dict_metadata.update(a=3), "a: is not a tensor's metadata"),
    ],
)
def test_metadata_that_leads_elsewhere_or_does_not_add_up_is_refused(change, how, message):
    with pytest.raises(ModelError, match=rf"archive: model_weights/\.metadata: .*{message}"):
        _read(change(how), "a")


def test_pieces_that_overlap_are_refused(change):
    def overlapping(metadata: Metadata) -> None:
        _joined(metadata)
        joined = metadata.state_dict_metadata["joined"]
        joined.chunks[1] = _chunk((0, 1), (2, 3))
        index = MetadataIndex("joined", torch.Size((0, 2)))
        metadata.storage_data[MetadataIndex("joined", torch.Size((0, 1)))] = metadata.storage_data.pop(index)

    with pytest.raises(ModelError, match="joined: its pieces do not cover the tensor exactly once"):
        _read(change(overlapping), "joined")


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32], ids=str)
def test_pieces_of_another_type_than_described_are_refused(change, dtype):
    folder = change(_tensor(properties=TensorProperties(dtype=dtype)))
    with pytest.raises(ModelError, match=r"__0_0\.distcp at \d+: a: expected .*found .*float32"):
        _read(folder, "a")


def test_pieces_are_read_as_suspiciously_as_whole_checkpoints(folder, change, tmp_path):
    class Touch:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    file = io.BytesIO()
    torch.save(Touch(), file)
    (folder / "model_weights/evil.distcp").write_bytes(file.getvalue())
    change(_place(relative_path="evil.distcp", offset=0, length=len(file.getvalue())))
    with pytest.raises(ModelError, match=r"evil\.distcp at 0: a: names "):
        _read(folder, "a")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_metadata_cut_anywhere_is_refused(folder, share):
    content = (folder / METADATA).read_bytes()
    (folder / METADATA).write_bytes(content[: int(share * len(content))])
    with pytest.raises(ModelError, match=r"model_weights/\.metadata: is not a pickle"):
        _read(folder, "a")


def test_metadata_of_too_many_pieces_is_refused(change):
    folder = change(_tensor(chunks=[_chunk((0, 0), (4, 3))] * 11))
    with open_archive(folder, folder) as source, pytest.raises(ModelError, match="a: has no pieces, or more than 10"):
        DistributedTensors(source, max_pieces_per_tensor=10)


def test_values_that_are_no_tensors_are_told_by_kind(folder, tmp_path):
    dcp.save(
        {"x": io.BytesIO(b"state"), "y": torch.ones(2)},
        storage_writer=dcp.FileSystemWriter(tmp_path / "x"),
        no_dist=True,
    )
    for path in (tmp_path / "x").iterdir():
        (folder / "model_weights" / path.name).write_bytes(path.read_bytes())
    with open_archive(folder, folder) as source:
        tensors = DistributedTensors(source)
    assert list(tensors.tensors) == ["y"]
    assert tensors.non_tensors == {"x": "BytesStorageMetadata"}
