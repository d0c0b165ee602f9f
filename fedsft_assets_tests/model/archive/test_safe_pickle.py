"""Pickles are read as descriptions: what a name stands for is the caller's say, and nothing else happens."""

import io
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest

from fedsft_assets.model.archive.safe_pickle import OpaqueObject, SafeCallable, read_pickle
from fedsft_assets.model.errors import ModelError


class Point:
    def __init__(self, x: int, y: int) -> None:
        self.x, self.y = x, y


def _described(name: str) -> object | None:
    return OpaqueObject.constructor(name) if name.endswith(".Point") else None


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_an_object_is_described_without_its_class(protocol):
    found = read_pickle(pickle.dumps({"p": [Point(1, 2)]}, protocol), "file", _described)
    point = found["p"][0]
    assert isinstance(point, OpaqueObject)
    assert point.class_name == f"{__name__}.Point"
    assert (point.field("x"), point.field("y"), point.field("z")) == (1, 2, None)


def test_plain_values_come_as_they_are():
    value = {"a": [1, -5, 1 << 40, 2.5, None, True], "b": ("x", b"y", {}), "c": OrderedDict()}
    safe = {
        "collections.OrderedDict": SafeCallable(OrderedDict),
        "_codecs.encode": SafeCallable(lambda text, _: text.encode()),
    }
    assert read_pickle(pickle.dumps(value, 2), "file", safe.get) == value


def test_what_is_not_known_is_refused_by_name_and_not_called(tmp_path):
    class Attack:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    with pytest.raises(ModelError, match=r"^file: names (pathlib|builtins|__builtin__)\S* which a checkpoint"):
        read_pickle(pickle.dumps(Attack()), "file", _described)
    assert not (tmp_path / "ran").exists()


def test_what_is_stored_elsewhere_is_the_callers():
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return ("there", 7) if value == "elsewhere" else None

    file = io.BytesIO()
    Pickler(file, 2).dump(["elsewhere"])
    data = file.getvalue()
    assert read_pickle(data, "file", _described, persistent_load=lambda pid: pid) == [("there", 7)]
    with pytest.raises(ModelError, match=r"^file: refers to external data"):
        read_pickle(data, "file", _described)
