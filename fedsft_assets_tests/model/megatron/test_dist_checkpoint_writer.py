"""What is written is what torch itself reads as a distributed checkpoint."""

import io
import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from fedsft_assets.model.megatron.dist_checkpoint_writer import FOLDER, Piece, write_checkpoint

_TABLE = torch.arange(12, dtype=torch.float16).reshape(4, 3)
_ROWS = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(1))


def _pieces(rows: Tensor = _ROWS) -> Iterator[Piece]:
    yield Piece("table", _TABLE.dtype, (4, 3), None, lambda: _TABLE)
    for row in range(len(rows)):
        # A view of a larger tensor, of which no more than itself must be stored.
        yield Piece("layers", rows.dtype, tuple(rows.shape), row, lambda row=row: rows[row])


def _write(folder: Path) -> Path:
    """The checkpoint's files in a folder, cut out of the one file that they were written into, behind other bytes."""
    file, places = io.BytesIO(b"something else"), {}
    file.seek(0, io.SEEK_END)

    @contextmanager
    def member(name: str) -> Iterator[None]:
        start = file.tell()
        yield
        places[name] = (start, file.tell())

    write_checkpoint(file, member, _pieces(), ["layers._extra_state/shard_0_1"])
    for name, (start, end) in places.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(file.getvalue()[start:end])
    return folder / FOLDER


@pytest.fixture
def written(tmp_path) -> Path:
    return _write(tmp_path)


def test_torch_reads_tables_and_rows_back_bit_for_bit(written):
    loaded = {"table": torch.zeros(4, 3, dtype=torch.float16), "layers": torch.zeros(3, 2, 5)}
    dcp.load(loaded, storage_reader=dcp.FileSystemReader(written), no_dist=True)
    assert torch.equal(loaded["table"], _TABLE)
    assert torch.equal(loaded["layers"], _ROWS)


def test_a_row_is_stored_alone(written):
    stored = dcp.FileSystemReader(written).read_metadata().storage_data
    rows = [place for index, place in stored.items() if index.fqn == "layers"]
    assert len(rows) == 3
    for place in rows:
        content = (written / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
        tensor = torch.load(io.BytesIO(content), weights_only=True)
        assert tensor.shape == (1, 2, 5)
        assert tensor.untyped_storage().nbytes() == 40


def test_states_are_empty_lists_of_one(written):
    metadata = dcp.FileSystemReader(written).read_metadata()
    assert type(metadata.state_dict_metadata["layers._extra_state/shard_0_1"]).__name__ == "BytesStorageMetadata"
    (place,) = (place for index, place in metadata.storage_data.items() if "_extra_state" in index.fqn)
    content = (written / place.relative_path).read_bytes()[place.offset : place.offset + place.length]
    assert torch.load(io.BytesIO(content), weights_only=True) == [None]


def test_megatrons_own_notes_are_there(written):
    metadata = pickle.loads((written / ".metadata").read_bytes())
    assert metadata.mcore_data == {"table": {}, "layers": {}}
    assert torch.load(written / "common.pt", weights_only=True) == {}
    assert json.loads((written / "metadata.json").read_text()) == {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
