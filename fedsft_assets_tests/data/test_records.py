"""Records: reading a split back, and showing it."""

from pathlib import Path

import pytest

from fedsft_assets.data.records import DataError, Record, dump_records, preview, read_records


def test_records_read_back_as_written(tmp_path: Path) -> None:
    records = [Record(input="Où?\u2028Là.", output='"quoted"\n|'), Record(input=" a ", output="b")]
    path = tmp_path / "training.jsonl"
    path.write_bytes(dump_records(records))
    assert read_records(path) == records


def test_texts_that_look_like_the_end_of_a_record_stay_inside_it(tmp_path: Path) -> None:
    records = [Record(input='},{"input":', output='{"},{"input":"'), Record(input="},{", output='"},{"')]
    path = tmp_path / "training.jsonl"
    path.write_bytes(dump_records(records))
    assert len(path.read_bytes().splitlines()) == 2
    assert read_records(path) == records
    assert dump_records([]) == b""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"input": "a"}', r"training\.jsonl: line 2: output: expected a string, found input"),
        (b'{"input": 7, "output": "b"}', r"training\.jsonl: line 2: input: expected a string, found 7"),
        (b'{"input": "a", "out', r"training\.jsonl: line 2: is not JSON .*found '\{\"input\": \"a\", \"out'"),
        (b'["a", "b"]', r"training\.jsonl: line 2: expected a JSON object, found '\[\"a\", \"b\"\]'"),
        (b'{"input": "\xff", "output": "b"}', r"training\.jsonl: line 2: is not JSON"),
    ],
)
def test_a_bad_line_is_named_with_its_field(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "training.jsonl"
    path.write_bytes(dump_records([Record(input="a", output="b")]) + line + b"\n")
    with pytest.raises(DataError, match=message):
        read_records(path)


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"testing\.jsonl: cannot be read: No such file"):
        read_records(tmp_path / "testing.jsonl")


def test_the_preview_is_one_table_row_per_record_whatever_the_text() -> None:
    records = [
        Record(input="a|b\nc", output="x" * 500),
        Record(input="<b>\\", output="d"),
        Record(input="e", output="f"),
    ]
    header, rule, first, second = preview(records, 2).splitlines()
    assert (header, rule) == ("| input | output |", "| --- | --- |")
    assert first == f"| a\\|b<br>c | {'x' * 199}… |"
    assert second == "| &lt;b>\\\\ | d |"
