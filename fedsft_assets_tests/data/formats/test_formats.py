"""Files of every format: rows as examples, rows that cannot be used, and files that are no such thing."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedsft_assets.data.formats import json_files
from fedsft_assets.data.formats.examples import Examples
from fedsft_assets.data.formats.readers import read_examples
from fedsft_assets.data.records import DataError
from fedsft_assets.specs.dataset import ColumnsSpec, DataFormat, DatasetSpec

_COLUMNS = ColumnsSpec(instruction="q", context="c", response="a")
_ROWS = [
    {"q": "one", "c": "with\nline", "a": 'say "1", or \\1'},
    {"q": "zwei", "c": "", "a": "2\u2028"},
    {"q": "三", "c": None, "a": "3"},
]


def _spec(path: Path, format: DataFormat) -> DatasetSpec:
    return DatasetSpec(name="mine", path=path, format=format, columns=_COLUMNS)


def _read(path: Path, format: DataFormat) -> list[Examples]:
    return list(read_examples(_spec(path, format), path.parent))


def _rows(batches: list[Examples]) -> list[tuple[int, str | None, str, str | None]]:
    return [
        row
        for batch in batches
        for row in zip(
            batch.rows.tolist(),
            batch.instruction.to_pylist(),
            batch.context.fill_null("").to_pylist(),
            batch.response.to_pylist(),
            strict=True,
        )
    ]


def _rejected(batches: list[Examples]) -> list[tuple[int, str]]:
    return [(row.row, row.reason) for batch in batches for row in batch.rejected]


def _parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(_ROWS), path)


def _parquet_of_other_types(path: Path) -> None:
    table = pa.Table.from_pylist(_ROWS)
    for index, column in enumerate(table.columns):
        kind = [pa.large_string(), pa.string_view(), None][index]
        other = column.cast(kind) if kind else column.dictionary_encode()
        table = table.set_column(index, table.column_names[index], other)
    pq.write_table(table, path)


def _jsonl(path: Path) -> None:
    path.write_text("\n".join(json.dumps(row) for row in _ROWS), encoding="utf-8")


def _json(path: Path) -> None:
    path.write_text(json.dumps(_ROWS, indent=1), encoding="utf-8")


def _jsonl_of_windows(path: Path) -> None:
    path.write_text("\ufeff" + "\r\n".join(json.dumps(row) for row in _ROWS), encoding="utf-8", newline="")


def _json_with_a_mark(path: Path) -> None:
    path.write_text("\ufeff" + json.dumps(_ROWS), encoding="utf-8")


def _csv(path: Path) -> None:
    path.write_text('\ufeffc,a,q\n"with\nline","say ""1"", or \\1",one\n,2\u2028,zwei\n,3,三\n', encoding="utf-8")


@pytest.mark.parametrize(
    ("write", "format", "first"),
    [
        (_parquet, "parquet", 1),
        (_parquet_of_other_types, "parquet", 1),
        (_jsonl, "jsonl", 1),
        (_jsonl_of_windows, "jsonl", 1),
        (_json, "json", 1),
        (_json_with_a_mark, "json", 1),
        (_csv, "csv", 2),
    ],
)
def test_every_format_gives_the_same_examples(
    tmp_path: Path, write: Callable[[Path], None], format: DataFormat, first: int
) -> None:
    path = tmp_path / "rows"
    write(path)
    batches = _read(path, format)
    assert _rows(batches) == [
        (first, "one", "with\nline", 'say "1", or \\1'),
        (first + 1, "zwei", "", "2\u2028"),
        (first + 2, "三", "", "3"),
    ]
    assert _rejected(batches) == []


def test_bad_lines_are_rejected_by_their_numbers_and_the_others_kept(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b"\n".join(
            [
                b'{"q": "a", "c": "b", "a": "c"}',
                b"",
                b'{"q": "a", "a": ',
                b'{"q": "a"}',
                b'{"q": 7, "a": "c"}',
                b'{"q": "a", "c": ["b"], "a": "c"}',
                b'["q", "a"]',
                b'{"q": "\xff", "a": "c"}',
                b'{"q": "\\ud800", "a": "c"}',
                b'{"q": null, "a": "c"}',
                b'{"a": "c", "q": "last", "more": 1}',
            ]
        )
    )
    batches = _read(path, "jsonl")
    assert _rows(batches) == [(1, "a", "b", "c"), (10, None, "", "c"), (11, "last", "", "c")]
    rejected = _rejected(batches)
    assert [row for row, _ in rejected] == [3, 7, 4, 5, 6, 8, 9]
    reasons = dict(rejected)
    assert reasons[4] == "a: is missing"
    assert reasons[5] == "q: expected a string, found int"
    assert reasons[6] == "c: expected a string, found list"
    assert reasons[7] == "expected a JSON object, found list"
    assert reasons[8] == "q: is not UTF-8"
    assert reasons[9] == "q: has an unpaired UTF-16 surrogate"
    assert reasons[3].startswith("is not JSON: ")


def test_lines_are_numbered_on_from_block_to_block(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"q": f"{n}", "a": "x", "c": ""}) for n in range(1, 60)))
    batches = list(json_files.read_lines(path, _COLUMNS, block=100))
    assert len(batches) > 5
    assert [(row, question) for row, question, _, _ in _rows(batches)] == [(n, f"{n}") for n in range(1, 60)]


def test_bytes_that_are_no_text_reject_their_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    questions = pa.array([b"a", b"\xff\xfe", b"c"], pa.binary())
    table = pa.table({"q": pa.StringArray.from_buffers(3, *questions.buffers()[1:]), "c": ["", "", ""], "a": ["x"] * 3})
    pq.write_table(table, path)
    batches = _read(path, "parquet")
    assert [row for row, *_ in _rows(batches)] == [1, 3]
    assert _rejected(batches) == [(2, "q: is not UTF-8")]

    (tmp_path / "rows.csv").write_bytes(b"q,c,a\na,,x\n\xff,,x\nc,,x\n")
    batches = _read(tmp_path / "rows.csv", "csv")
    assert [row for row, *_ in _rows(batches)] == [2, 4]
    assert _rejected(batches) == [(3, "q: is not UTF-8")]


def test_rows_of_a_csv_file_with_another_number_of_fields_are_rejected(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'q,c,a\na,,x\nb,y\n"c\nd",,x\ne,,x,\xffmore\n\nf,,x\n')
    batches = _read(path, "csv")
    assert [(row, question) for row, question, *_ in _rows(batches)] == [(2, "a"), (4, "c\nd"), (7, "f")]
    assert _rejected(batches) == [(3, "expected 3 fields, found 2"), (5, "expected 3 fields, found 4")]


def _truncated(path: Path) -> None:
    pq.write_table(pa.table({"q": ["a"] * 1000, "c": [""] * 1000, "a": ["b"] * 1000}), path)
    path.write_bytes(path.read_bytes()[:-200])


def _damaged_inside(path: Path) -> None:
    texts = [f"{n}" for n in range(1000)]
    pq.write_table(pa.table({"q": texts, "c": texts, "a": texts}), path, compression="gzip")
    content = bytearray(path.read_bytes())
    content[40:140] = bytes(100)
    path.write_bytes(bytes(content))


def _json_text(content: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(content, encoding="utf-8")

    return write


@pytest.mark.parametrize(
    ("format", "write", "message"),
    [
        ("parquet", Path.touch, r"rows: is empty; download it again"),
        (
            "parquet",
            _jsonl,
            r"rows: is not a (complete )?Parquet file, found '\{\"q\": \"one\".*'; use the file as published",
        ),
        ("parquet", _truncated, r"rows: is not a complete Parquet file .*; download it again"),
        ("parquet", _damaged_inside, r"rows: is not a complete Parquet file .*; download it again"),
        (
            "parquet",
            lambda path: pq.write_table(pa.table({"title": ["a"], "c": ["b"]}), path),
            r"rows: column q: is missing, found title, c; use the file as published, or set columns to match it",
        ),
        (
            "parquet",
            lambda path: pq.write_table(pa.table({"q": [1], "c": ["b"], "a": ["b"]}), path),
            r"rows: column q: expected strings, found int64; use the file as published",
        ),
        ("jsonl", Path.touch, r"rows: is empty; download it again"),
        ("jsonl", _parquet, r"rows: is a Parquet file, expected jsonl; set 'format: parquet'"),
        ("jsonl", _json_text("q\n"), r"rows: field q: is missing in every row, found no JSON object \(row 1: is not"),
        (
            "jsonl",
            _json_text('{"question": "a", "a": "b"}\n'),
            r"rows: field q: is missing in every row, found question, a",
        ),
        ("jsonl", _json_text('{"q": "a", "a": "b"}\n'), r"rows: field c: is missing in every row, found q, a"),
        ("json", _jsonl, r"rows: after row 0: is not a JSON array of objects .*set 'format: jsonl'"),
        (
            "json",
            _json_text('[{"q": "a", "c": "", "a": "b"}, {"q"'),
            r"rows: row 2: ends in the middle, after '\{\"q\"'",
        ),
        ("json", _json_text('[{"q": "a", "c": "", "a": "b"} {"q"'), r"rows: after row 1: is not a JSON array of obj"),
        ("json", _json_text('{"data": []}'), r"rows: after row 0: is not a JSON array .*found '\{\"data\": \[\]\}'"),
        (
            "json",
            _json_text("[1, 2]"),
            r"rows: field q: is missing in every row, found no JSON object \(row 1: expected",
        ),
        ("csv", _json_text("title,c\na,b\n"), r"rows: column q, a: is missing, found title, c; set columns to match"),
        ("csv", _json_text('q,c,a\na,,x\n"b,,x\n'), r"rows: row 3: a quote is opened and never closed, .* line 3; "),
        ("csv", _json_text('q,c,a\na,,x\n"b"c,,x\n'), r"rows: row 3, line 3: is not valid CSV .*; fix the quotes"),
        ("csv", _parquet, r"rows: is a Parquet file, expected csv; set 'format: parquet'"),
        ("csv", Path.touch, r"rows: is empty"),
    ],
)
def test_an_unusable_file_is_named_with_what_was_found(
    tmp_path: Path, format: DataFormat, write: Callable[[Path], None], message: str
) -> None:
    path = tmp_path / "rows"
    write(path)
    with pytest.raises(DataError, match=message):
        _read(path, format)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows: is missing"):
        _read(tmp_path / "rows", "csv")
