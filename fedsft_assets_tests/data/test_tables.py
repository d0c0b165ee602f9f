"""Columns of files: what is wrong with a file is said with its name, the column or line, and what to do."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedsft_assets.data.records import DataError
from fedsft_assets.data.tables import count_rows, is_number, is_text, json_lines_texts, parquet_table, parquet_texts


def test_nulls_are_blank_and_every_text_type_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    plain = pa.array(["a", None, "ü"])
    columns = {"a": plain, "b": plain.cast(pa.large_string()), "c": plain.dictionary_encode()}
    pq.write_table(pa.table(columns), path)
    assert list(parquet_texts(path, ("a", "b", "c"))) == [("a",) * 3, ("",) * 3, ("ü",) * 3]
    assert count_rows(path) == 3


def _not_there(path: Path) -> None:
    path.unlink(missing_ok=True)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _truncated(path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"] * 1000, "rank": [0] * 1000}), path)
    path.write_bytes(path.read_bytes()[:-200])


def _damaged_inside(path: Path) -> None:
    pq.write_table(pa.table({"text": [f"{n}" for n in range(1000)], "rank": [0] * 1000}), path, compression="gzip")
    content = bytearray(path.read_bytes())
    content[40:140] = bytes(100)
    path.write_bytes(bytes(content))


def _other_columns(path: Path) -> None:
    pq.write_table(pa.table({"title": ["a"], "rank": [0]}), path)


def _numbers(path: Path) -> None:
    pq.write_table(pa.table({"text": [1], "rank": [0]}), path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_not_there, r"rows\.parquet: is missing; put the file there as published"),
        (_empty, r"rows\.parquet: is empty; download it again"),
        (_truncated, r"rows\.parquet: is not a whole Parquet file .*; download it again"),
        (_damaged_inside, r"rows\.parquet: is not a whole Parquet file .*; download it again"),
        (_other_columns, r"rows\.parquet: column text: is missing, found title, rank; take the file as published"),
        (_numbers, r"rows\.parquet: column text: expected texts, found int64; take the file as published"),
    ],
)
def test_an_unusable_parquet_file_is_named(tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "rows.parquet"
    spoil(path)
    with pytest.raises(DataError, match=message):
        list(parquet_texts(path, ("text",)))
    with pytest.raises(DataError, match=message):
        parquet_table(path, {"text": is_text, "rank": is_number})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"instruction": "a"}', r"rows\.jsonl: line 3: response: is missing, found instruction"),
        ('{"instruction": "a", "response": ["b"]}', r"rows\.jsonl: line 3: response: expected a text, found \['b'\]"),
        ('{"instruction": "a", ', r"rows\.jsonl: line 3: is not JSON"),
    ],
)
def test_an_unusable_json_line_is_named_by_its_number_in_the_file(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "response": null}\n\n' + line)
    rows = json_lines_texts(path, ("instruction", "response"))
    assert next(rows) == ("a", "")
    with pytest.raises(DataError, match=message):
        next(rows)
