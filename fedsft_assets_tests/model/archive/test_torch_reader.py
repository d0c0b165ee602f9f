"""What torch writes is read tensor by tensor, what is written torch reads, and hostile files are refused."""

import io
import pickle
import struct
import sys
import tracemalloc
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsft_assets.model.archive.torch_reader import TensorFile, TensorInfo
from fedsft_assets.model.archive.torch_writer import write_tensors
from fedsft_assets.model.errors import ModelError

Parts = dict[str, bytes]


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """Every type, scalars, empty ones, views with other strides, a parameter, and a tied pair."""
    torch.manual_seed(0)
    embedding = torch.randn(40, 7)
    return {
        "embedding": embedding,
        "half": torch.randn(5).half(),
        "bfloat": torch.randn(2, 3, 4).bfloat16(),
        "scalar": torch.tensor(4.5),
        "empty": torch.zeros(0, 3),
        "numbers": torch.arange(6),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "truth": torch.tensor([True, False, True]),
        "transposed": torch.randn(6, 4).t(),
        "columns": torch.randn(5, 6)[:, 1:3],
        "parameter": torch.nn.Parameter(torch.randn(4)),
        "head": embedding,
    }


def _saved(content: object) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(content, file)
    return file


def _opened(content: bytes) -> TensorFile:
    return TensorFile(io.BytesIO(content), "model.ckpt")


def test_every_tensor_that_torch_saves_is_read_with_its_type_shape_and_values(tensors):
    with TensorFile(_saved(tensors), "model.ckpt") as file:
        assert list(file.tensors) == list(tensors)
        assert file.shared == {"head": "embedding"}
        for name, expected in tensors.items():
            assert file.tensors[name] == TensorInfo(expected.dtype, tuple(expected.shape))
            found = file.read(name)
            assert found.is_contiguous()
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["embedding", "transposed", "bfloat"])
def test_rows_are_read_alone(tensors, name):
    with TensorFile(_saved(tensors), "model.ckpt") as file:
        assert torch.equal(file.read(name, (1, 2)), tensors[name][1:2])


def test_a_tensor_read_is_memory_of_its_own():
    shared = torch.arange(10.0)
    with TensorFile(_saved({"a": shared[:4], "b": shared[4:]}), "model.ckpt") as file:
        file.read("a").fill_(-1)
        assert torch.equal(file.read("a"), shared[:4])
        assert file.read("b").untyped_storage().nbytes() == 6 * 4


def test_nested_dictionaries_have_names_with_dots_and_other_values_are_told_by_type():
    content = {"state": {"layer": {"w": torch.ones(2)}}, "epoch": 3, "fp8": None, "extra": io.BytesIO(b"abc")}
    with TensorFile(_saved(content), "model.ckpt") as file:
        assert list(file.tensors) == ["state.layer.w"]
        assert file.non_tensors == {"epoch": "int", "fp8": "NoneType", "extra": "BytesIO"}
    with TensorFile(_saved(torch.ones(3)), "chunk") as file:
        assert torch.equal(file.read(""), torch.ones(3))


@pytest.mark.parametrize("zip64_from", [0xFFFFFFFF, 10])
def test_what_is_written_torch_loads_alone_and_mapped_with_ties_and_alignment(tensors, tmp_path, zip64_from):
    path = tmp_path / "model.ckpt"
    with TensorFile(_saved(tensors), "model.ckpt") as source, path.open("wb") as file:
        write_tensors(file, source.tensors, source.read, source.shared, zip64_from)
    assert zipfile.ZipFile(path).testzip() is None
    for mapped in (False, True):
        loaded = torch.load(path, weights_only=True, mmap=mapped)
        assert isinstance(loaded, OrderedDict)
        assert list(loaded) == list(tensors)
        for name, expected in tensors.items():
            assert loaded[name].dtype == expected.dtype
            assert torch.equal(loaded[name], expected)
            assert not expected.numel() or loaded[name].data_ptr() % 64 == 0
        assert loaded["head"].data_ptr() == loaded["embedding"].data_ptr()
    with path.open("rb") as file, TensorFile(file, "model.ckpt") as again:
        assert (again.tensors, again.shared) == (source.tensors, source.shared)


def test_equal_tensors_give_equal_bytes(tensors):
    files = [io.BytesIO(), io.BytesIO()]
    for file in files:
        copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        write_tensors(file, {n: TensorInfo(t.dtype, tuple(t.shape)) for n, t in copies.items()}, copies.__getitem__)
    assert files[0].getvalue() == files[1].getvalue()


def test_one_tensor_at_a_time_is_read_and_written(tmp_path):
    infos = {f"layer{index}": TensorInfo(torch.float32, (1 << 20,)) for index in range(8)}
    alive: list[int] = []

    def make(name: str) -> torch.Tensor:
        import weakref

        tensor = torch.full(infos[name].shape, float(name[-1]))
        alive.append(1)
        weakref.finalize(tensor, alive.pop)
        assert len(alive) == 1
        return tensor

    path = tmp_path / "model.ckpt"
    with path.open("wb") as file:
        write_tensors(file, infos, make)
    with path.open("rb") as file, TensorFile(file, "model.ckpt") as tensors:
        tracemalloc.start()  # sees Python's own buffers: torch's memory is the tensor's
        for index in range(8):
            assert tensors.read(f"layer{index}")[0] == index
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


def test_a_tensor_other_than_described_is_not_written():
    with pytest.raises(ModelError, match=r"a: expected .*shape=\(2,\).*, found .*shape=\(3,\)"):
        write_tensors(io.BytesIO(), {"a": TensorInfo(torch.float32, (2,))}, lambda _: torch.ones(3))
    with pytest.raises(ModelError, match=r"a: values of torch\.complex64 cannot be written"):
        write_tensors(io.BytesIO(), {"a": TensorInfo(torch.complex64, (2,))}, lambda _: torch.ones(2))


def _parts(content: object) -> Parts:
    with zipfile.ZipFile(_saved(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _packed(parts: Parts, compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return file.getvalue()


def _with_pickle(data: bytes) -> bytes:
    return _packed({**_parts({"a": torch.ones(4)}), "archive/data.pkl": data})


class _Call:
    def __init__(self, function: Callable, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    ("attack", "name"),
    [
        (lambda path: _Call(__import__("os").system, f"touch {path}"), r"posix\.system"),
        (lambda path: _Call(eval, f"open({str(path)!r}, 'w')"), r"builtins\.eval|__builtin__\.eval"),
        (lambda path: _Call(Path.touch, path), r"pathlib|getattr"),
        (lambda _: np.ones(3), "numpy"),
        (lambda _: torch.device("cpu"), r"torch\.device"),
        (lambda _: {1, 2}, "builtins.set|__builtin__.set|instruction"),
    ],
    ids=["system", "eval", "method", "numpy", "device", "set"],
)
def test_pickles_that_name_anything_but_tensors_are_refused_and_do_nothing(tmp_path, attack, name, protocol):
    data = pickle.dumps({"a": attack(tmp_path / "ran")}, protocol)
    with pytest.raises(ModelError, match=rf"model\.ckpt: .*({name})"):
        _opened(_with_pickle(data))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x02}",
        b"\x80\x02.",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.",  # a terabyte of BYTEARRAY8
        b"\x80\x02" + b"(" * 100_000 + b".",
        b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".",
        b"\x80\x02}X\x01\x00\x00\x00ac__main__\nX\n)\x81s.",
        b"\x80\x02X\x01\x00\x00\x00a)R.",
        b"\x80\x02}}b.",
        b"\x80\x02" + b"}(" + b"(K\x01K\x02t" + b"2\x86" * 60 + b"K\x01u.",  # a key that takes years to hash
        b"\x80\x02}X\x01\x00\x00\x00a}" + b"(X\x01\x00\x00\x00bh\x00X\x01\x00\x00\x00ch\x00u" + b"s.",
        b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.",  # a dictionary in itself
    ],
    ids=range(12),
)
def test_pickles_that_break_or_exhaust_a_reader_are_refused_with_little_memory(data):
    tracemalloc.start()
    with pytest.raises(ModelError, match=r"model\.ckpt: "):
        _opened(_with_pickle(data))
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def test_an_index_of_the_memo_for_which_pythons_own_reader_takes_gigabytes_takes_none():
    tracemalloc.start()
    with _opened(_with_pickle(b"\x80\x02}r\xff\xff\xff\xff.")) as file:
        assert not file.tensors
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_dictionaries_that_are_there_exponentially_often_are_refused():
    content: dict = {"w": torch.ones(1)}
    for _ in range(30):
        content = {"a": content, "b": content}
    with pytest.raises(ModelError, match=r"more than 100000"):
        TensorFile(_saved(content), "model.ckpt")


def _described(shape: object, stride: object, offset: object = 0, numel: object = 4, key: object = "0") -> bytes:
    """The pickle of one tensor of float32, with anything in its description."""

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return ("storage", torch.FloatStorage, key, "cpu", numel) if isinstance(value, Storage) else None

    file = io.BytesIO()
    call = _Call(torch._utils._rebuild_tensor_v2, Storage(), offset, shape, stride, False, OrderedDict())
    Pickler(file, 2).dump({"a": call})
    return file.getvalue()


def test_the_description_used_by_the_attacks_is_itself_read():
    with _opened(_with_pickle(_described((2, 2), (2, 1)))) as file:
        assert torch.equal(file.read("a"), torch.ones(2, 2))


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": (5,), "stride": (1,)},
        {"shape": (2,), "stride": (4,)},
        {"shape": (4,), "stride": (1,), "offset": 1},
        {"shape": (1 << 40,), "stride": (0,)},
        {"shape": (1 << 61, 1 << 61), "stride": (1, 1)},
        {"shape": (2, 3), "stride": (1, 1)},
        {"shape": (-2,), "stride": (1,)},
        {"shape": (2,), "stride": (-1,)},
        {"shape": (2,), "stride": (1,), "offset": -4},
        {"shape": (2,), "stride": (1, 1)},
        {"shape": (2.0,), "stride": (1,)},
        {"shape": (1,) * 40, "stride": (1,) * 40},
        {"shape": (8,), "stride": (1,), "numel": 8},
        {"shape": (2,), "stride": (1,), "numel": -1},
        {"shape": (2,), "stride": (1,), "key": "7"},
        {"shape": (2,), "stride": (1,), "key": "../data.pkl"},
    ],
    ids=str,
)
def test_tensors_that_exceed_their_storage_are_refused(changes):
    with pytest.raises(ModelError, match=r"model\.ckpt: "):
        _opened(_with_pickle(_described(**changes)))


def test_tensors_that_overlap_to_be_more_than_the_file_are_refused():
    storage = torch.arange(1000.0)
    with pytest.raises(ModelError, match=r"model\.ckpt: \w+: overlaps other tensors"):
        TensorFile(_saved({f"t{index}": storage[index : index + 500] for index in range(100)}), "model.ckpt")


def _patch_directory(content: bytes, entry: str, field: int, form: str, value: int) -> bytes:
    """Change a field of the entry in the zip's central directory."""
    changed = bytearray(content)
    at = content.rindex(entry.encode()) - 46
    assert content[at : at + 4] == b"PK\1\2"
    struct.pack_into(form, changed, at + field, value)
    return bytes(changed)


@pytest.mark.parametrize(
    ("field", "form", "value"),
    [(42, "<L", 0), (42, "<L", 7), (42, "<L", 0xFFFFFFF0), (24, "<L", 1 << 30), (10, "<H", 8), (8, "<H", 1)],
    ids=["offset of another", "offset inside another", "offset outside", "size", "compressed", "encrypted"],
)
def test_lying_directories_are_refused(field, form, value):
    good = _packed(_parts({"a": torch.ones(4), "b": torch.zeros(4)}))
    with _opened(good) as file:
        assert len(file.tensors) == 2
    with pytest.raises(ModelError, match=r"model\.ckpt: "):
        _opened(_patch_directory(good, "archive/data/1", field, form, value))


def test_entries_of_which_one_lies_in_another_are_refused():
    parts = _parts({"a": torch.ones(64), "b": torch.zeros(1)})
    inner = _packed({"archive/data/1": parts.pop("archive/data/1")})
    parts["archive/data/0"] = inner[: inner.index(b"PK\1\2")].ljust(256, b"\0")
    good = _packed({**parts, "archive/data/1": b"\0" * 4})
    overlapping = _patch_directory(
        good, "archive/data/1", 42, "<L", good.index(b"PK\3\4", good.index(b"archive/data/0"))
    )
    with pytest.raises(ModelError, match=r"overlap|another name"):
        _opened(overlapping)


def test_compressed_doubled_and_foreign_zips_are_refused():
    parts = _parts({"a": torch.zeros(1000)})
    with pytest.raises(ModelError, match="compressed"):
        _opened(_packed(parts, zipfile.ZIP_DEFLATED))
    with pytest.raises(ModelError, match="expected the single folder of a torch checkpoint"):
        _opened(_packed({"word/document.xml": b""}))
    with pytest.raises(ModelError, match="expected the single folder"):
        _opened(_packed({**parts, "other/data.pkl": b""}))
    with pytest.raises(ModelError, match="byteorder: expected little, found b'big'"):
        _opened(_packed({**parts, "archive/byteorder": b"big"}))
    file = io.BytesIO(_packed(parts))
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data/0", b"\0" * 4000)
    with pytest.raises(ModelError, match="occurs twice"):
        TensorFile(file, "model.ckpt")


def test_files_cut_anywhere_are_refused(tensors):
    content = _saved(tensors).getvalue()
    for size in range(0, len(content), 97):
        with pytest.raises(ModelError, match=r"model\.ckpt: is truncated"):
            _opened(content[:size])


def test_a_file_cut_after_it_was_opened_is_noticed(tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"a": torch.ones(1 << 20)}, path)
    with path.open("rb") as file, TensorFile(file, "model.ckpt") as tensors:
        with path.open("r+b") as other:
            other.truncate(1 << 20)
        with pytest.raises(ModelError, match="truncated: a extends beyond the end of the file"):
            tensors.read("a")


def test_the_old_format_is_refused_with_what_to_do():
    file = io.BytesIO()
    torch.save({"a": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
    with pytest.raises(ModelError, match=r"before 1\.6.*save it again"):
        TensorFile(file, "model.ckpt")


def test_a_pickle_too_large_is_refused():
    with pytest.raises(ModelError, match=r"data\.pkl has \d+ bytes, more than 50"):
        TensorFile(_saved({"a": torch.ones(2)}), "model.ckpt", max_pickle_bytes=50)


def test_reading_imports_nothing_that_a_file_names():
    before = set(sys.modules)
    with pytest.raises(ModelError, match=r"xmlrpc\.server"):
        _opened(_with_pickle(b"\x80\x02cxmlrpc.server\nX\n)R."))
    assert "xmlrpc.server" not in set(sys.modules) - before
