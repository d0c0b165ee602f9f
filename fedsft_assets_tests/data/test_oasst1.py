"""OASST1: which messages of the trees become examples."""

import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedsft_assets.data import oasst1
from fedsft_assets.data.records import DataError, Example


def _write(folder: Path, train: list[dict[str, Any]], validation: list[dict[str, Any]], rank: pa.DataType) -> None:
    names = ("message_id", "parent_id", "text", "role", "lang")
    schema = pa.schema([*((name, pa.string()) for name in names), ("rank", rank)])
    for name, rows in zip(oasst1.FILES, (train, validation), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / name)


def _prompt(message: str, parent: str | None = None, lang: str = "en") -> dict[str, Any]:
    return {
        "message_id": message,
        "parent_id": parent,
        "text": f"ask {message}",
        "role": "prompter",
        "lang": lang,
        "rank": None,
    }


def _reply(message: str, parent: str | None, rank: float | None, lang: str = "en") -> dict[str, Any]:
    return {
        "message_id": message,
        "parent_id": parent,
        "text": f"say {message}",
        "role": "assistant",
        "lang": lang,
        "rank": rank,
    }


@pytest.mark.parametrize("rank", [pa.int32(), pa.float64()], ids=str)
def test_best_english_replies_come_with_the_prompt_that_they_answer(tmp_path: Path, rank: pa.DataType) -> None:
    train = [
        _prompt("p1"),
        _reply("r1", "p1", 0),
        _reply("r2", "p1", 1),
        _prompt("p2", "r1"),
        _reply("r3", "p2", 0),
        _reply("r4", "p2", None),
        _prompt("p3", lang="de"),
        _reply("r5", "p3", 0, "de"),
    ]
    _write(tmp_path, train, [_prompt("p4"), _reply("r6", "p4", 0)], rank)
    assert list(oasst1.read(tmp_path)) == [
        Example("ask p1", "", "say r1"),
        Example("ask p2", "", "say r3"),
        Example("ask p4", "", "say r6"),
    ]


def test_a_rank_that_is_not_a_number_is_no_rank(tmp_path: Path) -> None:
    _write(tmp_path, [_prompt("p1"), _reply("r1", "p1", math.nan), _reply("r2", "p1", 0.0)], [], pa.float64())
    assert [example.response for example in oasst1.read(tmp_path)] == ["say r2"]


def test_a_reply_to_no_prompt_is_unusable_but_no_crash(tmp_path: Path) -> None:
    orphans = [_reply("r1", "gone", 0), _reply("r2", None, 0), _reply("r3", "r1", 0), _reply("r4", "r4", 0)]
    _write(tmp_path, orphans, [_prompt("gone")], pa.int32())
    assert [example.instruction for example in oasst1.read(tmp_path)] == ["", "", "", ""]


def test_a_missing_validation_file_is_named(tmp_path: Path) -> None:
    _write(tmp_path, [_prompt("p1"), _reply("r1", "p1", 0)], [], pa.int32())
    (tmp_path / oasst1.FILES[1]).unlink()
    with pytest.raises(DataError, match=r"validation-00000-of-00001-134b8fd0c89408b6\.parquet: is missing"):
        list(oasst1.read(tmp_path))
