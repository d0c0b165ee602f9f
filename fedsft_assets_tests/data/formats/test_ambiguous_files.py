"""Files that say a thing twice, or say what is no text: the row or the file is refused, and nothing is guessed."""

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedsft_assets.data.formats import json_array
from fedsft_assets.data.formats.examples import Examples, Rejected
from fedsft_assets.data.formats.readers import read_examples
from fedsft_assets.data.records import DataError, read_records
from fedsft_assets.data.splits import split_dataset
from fedsft_assets.specs.dataset import ColumnsSpec, ConversationsSpec, DataFormat, DatasetSpec
from fedsft_assets_tests.shipped import DATASETS

_COLUMNS = ColumnsSpec(instruction="q", context="c", response="a")

Column = list[str]


def _spec(path: Path, format: DataFormat) -> DatasetSpec:
    return DatasetSpec(name="mine", path=path, format=format, columns=_COLUMNS)


def _read(path: Path, format: DataFormat) -> list[Examples]:
    return list(read_examples(_spec(path, format), path.parent))


def _objects(path: Path, format: DataFormat, objects: list[str]) -> None:
    """JSON objects as they are written here."""
    path.write_text("\n".join(objects) if format == "jsonl" else f"[{', '.join(objects)}]", encoding="utf-8")


def _pairs(batches: list[Examples]) -> list[tuple[str | None, str | None]]:
    return [
        pair
        for batch in batches
        for pair in zip(batch.instruction.to_pylist(), batch.response.to_pylist(), strict=True)
    ]


def _rejected(batches: list[Examples]) -> list[Rejected]:
    return [row for batch in batches for row in batch.rejected]


both_kinds_of_json = pytest.mark.parametrize("format", ["jsonl", "json"])


@both_kinds_of_json
@pytest.mark.parametrize(
    ("row", "reason", "found"),
    [
        ('{"q": "1", "a": "x", "q": "2"}', "q: occurs 2 times", "['1', '2']"),
        ('{"q": "1", "a": "x", "q" : "2"}', "q: occurs 2 times", "['1', '2']"),
        ('{"q": "1", "a": "x", "\\u0071": "2"}', "q: occurs 2 times", "['1', '2']"),
        ('{"q": "same", "q": "same", "a": "x"}', "q: occurs 2 times", "['same', 'same']"),
        ('{"q": "1", "a": "x", "a": null, "a": 7}', "a: occurs 3 times", "['x', None, 7]"),
        ('{"q": "1", "c": "", "a": "x", "c": "late"}', "c: occurs 2 times", "['', 'late']"),
        ('{"q": {"role": "user", "role": "system"}, "a": "x"}', "q: expected a string, found dict", "{'role': 'sys"),
    ],
)
def test_a_row_that_says_a_field_twice_is_rejected(
    tmp_path: Path, format: DataFormat, row: str, reason: str, found: str
) -> None:
    path = tmp_path / "rows"
    _objects(path, format, ['{"q": "1", "c": "", "a": "2"}', row, '{"q": "3", "c": "", "a": "4"}'])
    batches = _read(path, format)
    assert _pairs(batches) == [("1", "2"), ("3", "4")]
    (rejected,) = _rejected(batches)
    assert (rejected.file, rejected.row, rejected.reason) == ("rows", 2, reason)
    assert rejected.found.startswith(found)


@both_kinds_of_json
def test_what_is_said_twice_where_nobody_reads_it_does_no_harm(tmp_path: Path, format: DataFormat) -> None:
    path = tmp_path / "rows"
    _objects(
        path,
        format,
        [
            '{"id": 1, "q": "1", "c": "", "a": "2", "id": 2}',
            '{"q": "say \\"q\\": twice", "c": "q", "a": "\\"a\\": \\\\", "more": {"q": "x", "a": "y", "q": "z"}}',
        ],
    )
    batches = _read(path, format)
    assert _pairs(batches) == [("1", "2"), ('say "q": twice', '"a": \\')]
    assert _rejected(batches) == []


def test_too_many_rows_that_say_a_field_twice_refuse_the_dataset_with_what_was_found(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [f'{{"q": "What is {n}?", "c": "", "a": "It is {n}."' for n in range(200)]
    path.write_text("\n".join(f'{row}, "a": "No."}}' if n % 20 == 3 else f"{row}}}" for n, row in enumerate(rows)))
    message = r"mine: 10 of 200 rows .* rows\.jsonl row 4: a: occurs 2 times \(\['It is 3\.', 'No\.'\]\); .* fix them"
    with pytest.raises(DataError, match=message):
        split_dataset(_spec(path, "jsonl"), tmp_path, tmp_path / "splits")


@both_kinds_of_json
def test_half_of_a_surrogate_pair_rejects_its_row(tmp_path: Path, format: DataFormat) -> None:
    path = tmp_path / "rows"
    halves = ["\\ud83d", "\\ude00", "\\udc97", "\\udfff", "\\ude00\\ud83d", "\\ud83d\\ud83d"]
    fine = '{"q": "1", "c": "\\ud83d\\ude00", "a": "yes", "unread": "\\ud83d"}'
    _objects(path, format, [fine, *(f'{{"q": "1", "c": "", "a": "an end{half}"}}' for half in halves), fine])
    batches = _read(path, format)
    assert _pairs(batches) == [("1", "yes")] * 2
    assert [text for batch in batches for text in batch.context.to_pylist()] == ["😀"] * 2
    assert _rejected(batches) == [
        Rejected("rows", row, "a: has an unpaired UTF-16 surrogate", f"an end{half}")
        for row, half in enumerate(halves, start=2)
    ]


@pytest.mark.parametrize("chars", [1, 3, 5])
def test_escapes_of_an_array_are_whole_wherever_the_file_is_divided(tmp_path: Path, chars: int) -> None:
    text = r'["\ud83d\ude00", "an end\ud83d", "\ude00\ud83d", "\ud83d\ud83d\ude00"]'
    (tmp_path / "rows").write_text(text)
    assert [value for _, value in json_array.values(tmp_path / "rows", chars)] == json.loads(text)


@pytest.mark.parametrize("format", ["jsonl", "json", "csv"])
def test_bytes_that_are_not_utf8_reject_their_row_with_its_field(tmp_path: Path, format: DataFormat) -> None:
    path = tmp_path / "rows"
    if format == "csv":
        path.write_text("q,c,a\nGrüße,,x\n1,,2\n", encoding="latin-1")
    else:
        _objects(path, format, ['{"q": "Gr__e", "c": "", "a": "x"}', '{"q": "1", "c": "", "a": "2"}'])
        path.write_bytes(path.read_bytes().replace(b"__", "üß".encode("latin-1")))
    batches = _read(path, format)
    assert _pairs(batches) == [("1", "2")]
    assert _rejected(batches) == [Rejected("rows", 1 + (format == "csv"), "q: is not UTF-8", "Gr\\xfc\\xdfe")]


@both_kinds_of_json
def test_numbers_that_only_python_writes_matter_only_where_a_text_belongs(tmp_path: Path, format: DataFormat) -> None:
    path = tmp_path / "rows"
    rows = [
        '{"q": "1", "c": "", "a": "2", "score": NaN}',
        '{"q": "1", "c": NaN, "a": "2"}',
        '{"q": -Infinity, "a": "2"}',
    ]
    _objects(path, format, rows)
    batches = _read(path, format)
    assert _pairs(batches) == [("1", "2")]
    assert [(row.row, row.reason, row.found) for row in _rejected(batches)] == [
        (2, "c: expected a string, found float", "nan"),
        (3, "q: expected a string, found float", "-inf"),
    ]


def test_a_value_that_is_nested_too_deeply_is_no_crash(tmp_path: Path) -> None:
    deep = f'{{"q": "1", "c": "", "a": "2", "more": {"[" * 100_000}{"]" * 100_000}}}'
    _objects(tmp_path / "rows.jsonl", "jsonl", ['{"q": "1", "c": "", "a": "2"}', deep])
    (rejected,) = _rejected(_read(tmp_path / "rows.jsonl", "jsonl"))
    assert (rejected.row, rejected.reason) == (2, "is not JSON: nested too deeply")
    _objects(tmp_path / "rows.json", "json", ['{"q": "1", "c": "", "a": "2"}', deep])
    with pytest.raises(
        DataError, match=r"rows\.json: after row 1: is not a JSON array of objects \(nested too deeply\)"
    ):
        _read(tmp_path / "rows.json", "json")


def test_a_csv_column_that_is_there_twice_is_refused_if_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("q,c,a,more,a\n1,,2,,3\n")
    with pytest.raises(
        DataError, match=r"rows\.csv: row 1: column a: is the name of columns 3 and 5; give each a unique name"
    ):
        _read(path, "csv")
    path.write_text("q,,c,a,more,,more\n1,,,2,,,\n")
    assert _pairs(_read(path, "csv")) == [("1", "2")]


def test_a_parquet_column_that_is_there_twice_is_refused_if_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"

    def write(*names: str) -> None:
        columns = [pa.array([f"{place}"]) for place in range(len(names))]
        pq.write_table(pa.Table.from_arrays(columns, names=list(names)), path)

    write("q", "c", "a", "a")
    with pytest.raises(
        DataError, match=r"rows\.parquet: column a: is the name of 2 columns, found q, c, a, a; use the"
    ):
        _read(path, "parquet")
    write("q", "more", "c", "a", "more")
    assert _pairs(_read(path, "parquet")) == [("0", "3")]


def test_a_column_of_messages_that_is_there_twice_is_refused(source: Path) -> None:
    dataset = DATASETS["oasst1"]
    path = source / dataset.folder / dataset.file_names[0]
    table = pq.read_table(path)
    pq.write_table(table.append_column("text", table["role"]), path)
    with pytest.raises(DataError, match=rf"{path}: column text: is the name of 2 columns"):
        list(read_examples(dataset, path.parents[1]))
    pq.write_table(table.append_column("deleted", table["role"]).append_column("deleted", table["role"]), path)
    assert list(read_examples(dataset, path.parents[1]))
    careful = dataset.model_copy(update={"conversations": ConversationsSpec(leave_out=["deleted"])})
    with pytest.raises(DataError, match=rf"{path}: column deleted: is the name of [23] columns"):
        list(read_examples(careful, path.parents[1]))


def _write_columns(path: Path, format: DataFormat, questions: Column, contexts: Column, answers: Column) -> None:
    rows = [{"q": q, "c": c, "a": a} for q, c, a in zip(questions, contexts, answers, strict=True)]
    if format == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif format == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["q", "c", "a"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        _objects(path, format, [json.dumps(row) for row in rows])


_TEXTS = [f"text {n}" for n in range(5000)]
_OTHERS = [f"other {n}" for n in range(5000)]


@pytest.mark.parametrize("format", ["jsonl", "json", "csv", "parquet"])
@pytest.mark.parametrize(
    ("columns", "names", "texts"),
    [
        ((_TEXTS, [""] * 5000, [f" {text}\n" for text in _TEXTS]), "q and a", "instruction and the response"),
        ((_OTHERS, _TEXTS, _TEXTS), "c and a", "context and the response"),
        ((_TEXTS, _TEXTS, _OTHERS), "q and c", "instruction and the context"),
    ],
)
def test_two_columns_with_the_same_texts_in_every_row_are_refused(
    tmp_path: Path, format: DataFormat, columns: tuple[Column, Column, Column], names: str, texts: str
) -> None:
    path = tmp_path / "rows"
    _write_columns(path, format, *columns)
    message = rf"rows: columns {names}: hold the same text in each of 5000 rows, found '.*0'; .* with the {texts}"
    with pytest.raises(DataError, match=message):
        _read(path, format)


@pytest.mark.parametrize("change", [0, 4999])
def test_one_row_that_differs_is_enough(tmp_path: Path, change: int) -> None:
    path = tmp_path / "rows"
    answers = list(_TEXTS)
    answers[change] = "an answer"
    _write_columns(path, "parquet", _TEXTS, [""] * 5000, answers)
    assert len(_pairs(_read(path, "parquet"))) == 5000


def test_a_second_file_whose_answers_are_its_prompts_is_refused(tmp_path: Path) -> None:
    _write_columns(tmp_path / "one", "csv", _TEXTS, _TEXTS[::-1], _OTHERS)
    _write_columns(tmp_path / "two", "csv", _TEXTS, _OTHERS, _TEXTS)
    spec = _spec(tmp_path, "csv").model_copy(update={"files": ["one", "two"]})
    with pytest.raises(DataError, match=r"two: columns q and a: hold"):
        list(read_examples(spec, tmp_path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"input": "a", "output": "b", "input": "c"}',
            r"line 2: input: occurs 2 times, found \['a', 'c'\]; regenerate the",
        ),
        ('{"input": "a", "output": "b", "output" : "b"}', r"line 2: output: occurs 2 times, found \['b', 'b'\]"),
    ],
)
def test_a_record_that_says_a_field_twice_is_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "training.jsonl"
    path.write_text(f'{{"input": "a: \\"b\\": c", "output": "\\"input\\": d"}}\n{line}\n')
    with pytest.raises(DataError, match=message):
        read_records(path)
