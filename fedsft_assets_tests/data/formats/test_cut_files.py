"""Files that were cut off: the dataset fails at once, and is never taken with what is left."""

import csv
import gzip
import io
import json
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedsft_assets.data.formats import json_array
from fedsft_assets.data.formats.readers import read_examples
from fedsft_assets.data.records import DataError, read_records
from fedsft_assets.data.sources.fetch import fetch
from fedsft_assets.data.splits import split_dataset
from fedsft_assets.files import folder_digest
from fedsft_assets.specs.dataset import ColumnsSpec, DataFormat, DatasetSpec
from fedsft_assets.specs.limits import SplitSettings
from fedsft_assets_tests.shipped import DATASETS

_ROWS = [
    {"q": "one", "c": "with\nline", "a": 'say "1", or \\1 {[é😀'},
    {"q": "zwei", "c": "", "a": "2"},
    {"q": "三", "c": "x,y", "a": "drei 😀"},
]
_COLUMNS = ColumnsSpec(instruction="q", context="c", response="a")
_MANY = [{"q": f"What is {n} plus one?", "c": "", "a": f"It is {n + 1}."} for n in range(300)]


def _jsonl(rows: list[dict[str, str]], **options: Any) -> bytes:
    return "\n".join(json.dumps(row, **options) for row in rows).encode()


def _csv(rows: list[dict[str, str]], quoting: Any = csv.QUOTE_MINIMAL) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, ["q", "c", "a"], quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _spec(path: Path, format: DataFormat) -> DatasetSpec:
    return DatasetSpec(name="mine", path=path, format=format, columns=_COLUMNS)


def _questions(path: Path, format: DataFormat) -> list[str | None]:
    """Of all rows; none may be rejected."""
    batches = list(read_examples(_spec(path, format), path.parent))
    assert [rejected for batch in batches for rejected in batch.rejected] == []
    return [text for batch in batches for text in batch.instruction.to_pylist()]


@pytest.mark.parametrize("ensure_ascii", [True, False])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_a_jsonl_file_is_whole_or_refused_wherever_it_ends(tmp_path: Path, ensure_ascii: bool, line_end: str) -> None:
    path = tmp_path / "rows.jsonl"
    content = _jsonl(_ROWS, ensure_ascii=ensure_ascii).replace(b"\n", line_end.encode())
    for end in range(1, len(content) + 1):
        path.write_bytes(content[:end])
        rows = content[:end].splitlines()
        if rows[-1].endswith(b"}"):
            assert _questions(path, "jsonl") == [row["q"] for row in _ROWS[: len(rows)]]
        else:
            with pytest.raises(DataError, match=rf"{path}: row {len(rows)}: ends in the middle, after .*; download it"):
                _questions(path, "jsonl")


def test_a_json_array_is_whole_or_refused_wherever_it_ends(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    for chars in (1, 7, 1 << 20):
        for ensure_ascii in (True, False):
            content = json.dumps(_ROWS, indent=1, ensure_ascii=ensure_ascii).encode()
            path.write_bytes(content + b"\n ")
            assert list(json_array.values(path, chars)) == list(enumerate(_ROWS, start=1))
            for end in range(1, len(content)):
                path.write_bytes(content[:end])
                with pytest.raises(DataError, match=r"rows\.json: row [1-4]: ends in the middle, after .*download it"):
                    deque(json_array.values(path, chars), maxlen=0)


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_a_csv_file_that_ends_within_a_row_is_refused(tmp_path: Path, quoting: Any) -> None:
    path = tmp_path / "rows.csv"
    content = _csv(_ROWS, quoting)
    last = content.rindex("三".encode()) - (quoting == csv.QUOTE_ALL)
    answer = content.rindex(b"drei") - (quoting == csv.QUOTE_ALL)
    for end in range(last + 1, answer + 1):
        path.write_bytes(content[:end])
        with pytest.raises(DataError, match=r"rows\.csv: row 4: .*truncated.* download it again"):
            _questions(path, "csv")


def test_a_blank_last_text_is_a_cut_only_where_no_other_is_blank(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    for start in ("q,a,c\n1,2,\n3,4,", "q,c,a\n1,,\n2,,x\n3,,"):
        path.write_text(start)
        assert sum(len(batch.rows) for batch in read_examples(_spec(path, "csv"), tmp_path)) == start.count("\n")
    path.write_text("q,c,a\n1,,x\n2,,x\n3,,")
    with pytest.raises(DataError, match=r"rows\.csv: row 4: ends in the middle, after '3,,'"):
        _questions(path, "csv")


def test_a_csv_file_that_ends_in_its_last_text_is_refused_where_that_shows(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    quoted = _csv(_ROWS, csv.QUOTE_ALL)
    for end in range(quoted.rindex(b"drei"), len(quoted.rstrip(b'"\r\n')) + 1):
        path.write_bytes(quoted[:end])
        with pytest.raises(
            DataError, match=r"rows\.csv: row 4: a quote is opened and never closed, .* line 5; the file"
        ):
            _questions(path, "csv")
    plain = _csv(_ROWS).rstrip()
    for missing in (1, 2, 3):  # bytes of the last character
        path.write_bytes(plain[:-missing])
        with pytest.raises(DataError, match=r"rows\.csv: row 4: ends in the middle, after "):
            _questions(path, "csv")


@pytest.mark.parametrize("format", ["jsonl", "csv"])
def test_a_last_row_that_is_whole_needs_no_line_end(tmp_path: Path, format: DataFormat) -> None:
    path = tmp_path / "rows"
    content = _jsonl(_ROWS) if format == "jsonl" else _csv(_ROWS)
    for end in (b"", b"\n", b"\r\n", b"\n\n", b"\n \n"[: 1 if format == "csv" else 3]):
        path.write_bytes(content.rstrip() + end)
        assert _questions(path, format) == ["one", "zwei", "三"]
    path.write_bytes(
        b'q,c,a\n1,,x\n2,,""' if format == "csv" else b'{"q": "1", "c": "", "a": "x"}\n{"q": "2", "a": ""}'
    )
    assert _questions(path, format) == ["1", "2"]


def test_broken_rows_that_have_their_end_are_rejected_rows(tmp_path: Path) -> None:
    lines = tmp_path / "rows.jsonl"
    for broken in (b'{"q": "a", "a": \n', b'{"q": "a" "a": "b"}', b'{"q": "a"}}', b"]"):
        lines.write_bytes(_jsonl(_ROWS) + b"\n" + broken)
        batches = list(read_examples(_spec(lines, "jsonl"), tmp_path))
        assert [row.row for batch in batches for row in batch.rejected] == [4]
    table = tmp_path / "rows.csv"
    for broken in (b"a,b\n", b"a,b,c,d"):
        table.write_bytes(b"q,c,a\n1,,2\n" + broken)
        batches = list(read_examples(_spec(table, "csv"), tmp_path))
        assert [row.row for batch in batches for row in batch.rejected] == [3]


@pytest.mark.parametrize("format", ["jsonl", "csv", "json"])
def test_a_file_that_ends_in_zeros_is_refused(tmp_path: Path, format: DataFormat) -> None:
    path = tmp_path / "rows"
    content = {"jsonl": _jsonl(_MANY) + b"\n", "csv": _csv(_MANY), "json": json.dumps(_MANY).encode()}[format]
    path.write_bytes(content[:-2000] + bytes(2000))
    with pytest.raises(DataError, match=rf"rows: ends in zero bytes, {format} never does: .*; download it again"):
        _questions(path, format)


@pytest.mark.parametrize("format", ["jsonl", "csv", "json"])
def test_a_compressed_file_is_named_as_what_it_is_whole_or_cut(tmp_path: Path, format: DataFormat) -> None:
    path = tmp_path / "rows"
    content = gzip.compress(_jsonl(_MANY))
    for end in (len(content), len(content) // 2):
        path.write_bytes(content[:end])
        with pytest.raises(DataError, match=rf"rows: is compressed with gzip, expected {format}; unpack it"):
            _questions(path, format)


def _cut_jsonl(path: Path) -> None:
    path.write_bytes(_jsonl(_MANY)[:-10])


def _cut_csv(path: Path) -> None:
    path.write_bytes(_csv(_MANY)[: -len("It is 300.\r\n,,")])


def _cut_json(path: Path) -> None:
    path.write_bytes(json.dumps(_MANY).encode()[:-1])


def _cut_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(_MANY), path)
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("format", "write"),
    [("jsonl", _cut_jsonl), ("csv", _cut_csv), ("json", _cut_json), ("parquet", _cut_parquet)],
)
def test_a_cut_file_leaves_what_was_there_before(
    tmp_path: Path, format: DataFormat, write: Callable[[Path], None]
) -> None:
    """However many rows may be unusable, and whether it is fetched or split."""
    good, cut = tmp_path / "good.jsonl", tmp_path / "cut"
    good.write_bytes(_jsonl(_MANY))
    write(cut)
    raw, splits, downloads = tmp_path / "raw", tmp_path / "splits", tmp_path / "downloads"
    fetch(_spec(good, "jsonl"), "sample", raw, downloads)
    split_dataset(_spec(good, "jsonl"), raw, splits)
    before = folder_digest(raw), folder_digest(splits)
    with pytest.raises(DataError, match=r"cut: .*; download it again"):
        fetch(_spec(cut, format), "sample", raw, downloads)
    with pytest.raises(DataError, match=r"cut: .*; download it again"):
        split_dataset(_spec(cut, format), tmp_path, splits, SplitSettings(max_rejected=1))
    assert (folder_digest(raw), folder_digest(splits)) == before


def test_a_file_of_several_that_is_cut_is_named(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_bytes(_jsonl(_MANY[:100]))
    (tmp_path / "two.jsonl").write_bytes(_jsonl(_MANY[100:])[:-5])
    spec = _spec(tmp_path, "jsonl").model_copy(update={"files": ["two.jsonl", "one.jsonl"]})
    with pytest.raises(DataError, match=r"two\.jsonl: row 200: ends in the middle"):
        list(read_examples(spec, tmp_path))


def test_cut_files_of_conversation_trees_are_refused(source: Path) -> None:
    dataset = DATASETS["oasst1"]
    folder = source / dataset.folder
    for name in dataset.file_names:
        content = (folder / name).read_bytes()
        for end in (1, 4, 1000, len(content) // 2, len(content) - 1):
            (folder / name).write_bytes(content[:end])
            with pytest.raises(DataError, match=rf"{name}: is not a (complete )?Parquet file"):
                list(read_examples(dataset, folder))
        (folder / name).write_bytes(content)
    assert list(read_examples(dataset, folder))


def test_a_split_that_is_cut_is_refused(tmp_path: Path) -> None:
    """Such as one that only a site has."""
    path = tmp_path / "training.jsonl"
    path.write_bytes(b'{"input": "a", "output": "b"}\n{"input": "c", "outp')
    with pytest.raises(DataError, match=r"training\.jsonl: line 2: is not JSON"):
        read_records(path)
