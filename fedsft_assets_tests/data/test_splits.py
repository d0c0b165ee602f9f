"""Splits: faithful records, placed by content alone, and nothing lost when something is wrong."""

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedsft_assets.data.hashing import prompt_hashes
from fedsft_assets.data.records import DataError, read_records
from fedsft_assets.data.split_report import SplitReport
from fedsft_assets.data.splits import REJECTED_FILE, split_dataset, to_inputs
from fedsft_assets.files import folder_digest
from fedsft_assets.settings import PROJECT
from fedsft_assets.specs.dataset import ConversationsSpec, DatasetSpec
from fedsft_assets.specs.limits import SplitSettings
from fedsft_assets.store import SPLITS, split_file
from fedsft_assets_tests.data.conftest import Row, WriteDolly
from fedsft_assets_tests.shipped import DATASETS

_EVERY_DATASET = pytest.mark.parametrize("dataset", DATASETS.values(), ids=list(DATASETS))


def _rows(numbers: range) -> list[Row]:
    return [
        {"instruction": f"What is {n} plus one?", "context": f"Passage {n}." if n % 2 else "", "response": f"{n + 1}"}
        for n in numbers
    ]


def _placed(folder: Path) -> dict[tuple[str, str], str]:
    """The split of each record in a folder of splits."""
    return {
        (record["input"], record["output"]): split
        for split in SPLITS
        for record in read_records(split_file(folder, split))
    }


def _by_prompt(folder: Path) -> dict[int, str]:
    """The split of each prompt in a folder of splits."""
    placed = _placed(folder)
    hashes = prompt_hashes(pa.array([text for text, _ in placed])).tolist()
    return dict(zip(hashes, placed.values(), strict=True))


def _reference(dataset: str, folder: Path) -> set[tuple[frozenset[str], str]]:
    """Inputs as sets of their parts, and outputs, straight from the rows, as the published scripts define them."""
    if dataset == "oasst1":
        pairs = set()
        for path in sorted((folder / "data").glob("*.parquet")):
            messages = {message["message_id"]: message for message in pq.read_table(path).to_pylist()}
            for message in messages.values():
                if message["role"] == "assistant" and message["rank"] == 0 and message["lang"] == "en":
                    pairs.add((frozenset([messages[message["parent_id"]]["text"]]), message["text"]))
        return pairs
    if dataset == "alpaca":
        rows = pq.read_table(next((folder / "data").glob("*.parquet"))).to_pylist()
        texts = [(row["instruction"], row["input"], row["output"]) for row in rows]
    else:
        lines = (folder / "databricks-dolly-15k.jsonl").read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        texts = [(row["instruction"], row["context"], row["response"]) for row in rows]
    return {
        (frozenset([instruction.strip(), context.strip()]) if context.strip() else frozenset([instruction]), response)
        for instruction, context, response in texts
        if instruction.strip() and response.strip()
    }


@_EVERY_DATASET
def test_real_rows_become_the_records_of_the_published_preprocessing(
    dataset: DatasetSpec, real_samples: Path, tmp_path: Path
) -> None:
    raw = real_samples / dataset.folder
    report = split_dataset(dataset, raw, tmp_path)
    expected = _reference(dataset.name, raw)
    assert report.records == len(expected)
    written = list(_placed(tmp_path))
    parts = {frozenset(part) for part, _ in expected}
    for text, response in written:
        joined = text.split("\n\n")
        ways = [frozenset([text]), *(_halves(joined, cut) for cut in range(1, len(joined)))]
        assert any((way, response) in expected for way in ways if way in parts), text
    assert len(written) == len(expected)


def _halves(parts: list[str], cut: int) -> frozenset[str]:
    return frozenset(["\n\n".join(parts[:cut]), "\n\n".join(parts[cut:])])


@_EVERY_DATASET
def test_splitting_twice_gives_the_same_bytes(dataset: DatasetSpec, real_samples: Path, tmp_path: Path) -> None:
    first = split_dataset(dataset, real_samples / dataset.folder, tmp_path / "first")
    second = split_dataset(dataset, real_samples / dataset.folder, tmp_path / "second")
    assert first == second
    for split in SPLITS:
        paths = (split_file(tmp_path / name, split) for name in ("first", "second"))
        assert len({path.read_bytes() for path in paths}) == 1


def test_new_rows_never_move_old_rows_between_splits(
    dolly: DatasetSpec, write_dolly: WriteDolly, tmp_path: Path
) -> None:
    split_dataset(dolly, write_dolly(_rows(range(500))), tmp_path / "old")
    rows = _rows(range(9500))
    random.Random(0).shuffle(rows)
    split_dataset(dolly, write_dolly(rows), tmp_path / "new")
    old, new = _placed(tmp_path / "old"), _placed(tmp_path / "new")
    assert len(old) == 500
    assert old.items() <= new.items()


def test_splits_hold_their_proportions(dolly: DatasetSpec, write_dolly: WriteDolly, tmp_path: Path) -> None:
    raw = write_dolly(_rows(range(10_000)))
    for proportions in ((0.8, 0.1, 0.1), (0.6, 0.3, 0.1)):
        report = split_dataset(dolly, raw, tmp_path / "splits", SplitSettings(proportions=proportions))
        for split, proportion in zip(SPLITS, proportions, strict=True):
            assert report.counts[split] / 10_000 == pytest.approx(proportion, abs=0.01)


def test_the_seed_decides_which_split(dolly: DatasetSpec, write_dolly: WriteDolly, tmp_path: Path) -> None:
    raw = write_dolly(_rows(range(300)))
    for seed in (1, 2):
        split_dataset(dolly, raw, tmp_path / str(seed), SplitSettings(seed=seed))
    one, two = _by_prompt(tmp_path / "1"), _by_prompt(tmp_path / "2")
    assert one.keys() == two.keys()
    assert one != two


def test_the_same_prompt_falls_into_the_same_split_however_it_is_written(
    dolly: DatasetSpec, write_dolly: WriteDolly, tmp_path: Path
) -> None:
    rows: list[Row] = [{"instruction": f"Add {n}.", "context": f"To {n}.", "response": "a"} for n in range(200)]
    again: list[Row] = [{"instruction": f" to  {n}.", "context": f"ADD\n{n}. ", "response": "b"} for n in range(200)]
    whole: list[Row] = [{"instruction": f"Add {n}.\n\nTo {n}.", "response": "c"} for n in range(200)]
    for name, content in (("one", rows), ("two", again), ("three", whole)):
        split_dataset(dolly, write_dolly(content), tmp_path / name)
    one, two, three = (_by_prompt(tmp_path / name) for name in ("one", "two", "three"))
    assert len(one) == 200
    assert one == two == three


def test_instruction_and_context_come_in_either_order_decided_by_content() -> None:
    instruction = pa.array([f"Ask {n}?" for n in range(1000)])
    context = pa.array([f"Context {n}." for n in range(1000)])
    inputs = to_inputs(instruction, context, seed=1)[0].to_pylist()
    assert inputs == to_inputs(instruction, context, seed=1)[0].to_pylist()
    assert inputs != to_inputs(instruction, context, seed=2)[0].to_pylist()
    first = Counter(text.startswith("Ask") for text in inputs)
    assert first[True] == pytest.approx(500, abs=60)
    assert inputs[7] in ("Ask 7?\n\nContext 7.", "Context 7.\n\nAsk 7?")


def test_parts_are_stripped_where_they_are_joined_and_nothing_else_is_touched(
    dolly: DatasetSpec, write_dolly: WriteDolly, tmp_path: Path
) -> None:
    rows: list[Row] = [
        {"instruction": " Ask?\n", "context": "\n Context. ", "response": " answer\n"},
        {"instruction": " Alone?\n", "context": " ", "response": "answer"},
        *_rows(range(100)),
    ]
    split_dataset(dolly, write_dolly(rows), tmp_path / "splits")
    written = set(_placed(tmp_path / "splits"))
    assert written & {("Ask?\n\nContext.", " answer\n"), ("Context.\n\nAsk?", " answer\n")}
    assert (" Alone?\n", "answer") in written


def test_unusable_rows_are_written_down_with_number_and_reason_and_duplicates_counted(
    dolly: DatasetSpec, write_dolly: WriteDolly, tmp_path: Path
) -> None:
    bad: list[Row] = [
        {"instruction": " \n", "context": "a", "response": "b"},
        {"instruction": "a", "response": ""},
        {"instruction": None, "response": "b"},
        {"instruction": "a", "context": "x" * 5001, "response": "b"},
        {"instruction": "a", "response": "y" * 5001},
    ]
    same_prompt: list[Row] = [{"instruction": "What is 4 plus one?", "response": "five"}]
    raw = write_dolly([*_rows(range(100)), *bad, *_rows(range(9)), *same_prompt])
    with (raw / dolly.file_names[0]).open("ab") as file:
        file.write(b'\n{"instruction": "a", "resp\n')
    into = tmp_path / "splits"
    report = split_dataset(dolly, raw, into, SplitSettings(max_rejected=0.1, max_chars=5000))
    assert (report.records, report.rows, report.duplicates, report.rejected) == (101, 116, 9, 6)
    assert report.as_metadata()["records"] == 101
    assert report == SplitReport.read(into)
    assert report.digest == folder_digest(into, [f"{split}.jsonl" for split in SPLITS])
    rejected = [orjson.loads(line) for line in (into / REJECTED_FILE).read_bytes().splitlines()]
    assert [(row["row"], row["reason"].split(":")[0]) for row in rejected] == [
        (116, "is not JSON"),
        (101, "instruction"),
        (102, "response"),
        (103, "instruction"),
        (104, "context"),
        (105, "response"),
    ]
    assert [row["reason"] for row in rejected[1:]] == [
        "instruction: is blank",
        "response: is blank",
        "instruction: is null",
        "context: is longer than 5000 characters",
        "response: is longer than 5000 characters",
    ]
    assert {row["file"] for row in rejected} == {dolly.file_names[0]}


def test_too_many_unusable_rows_stop_it_and_the_old_splits_stay(
    dolly: DatasetSpec, write_dolly: WriteDolly, tmp_path: Path
) -> None:
    into = tmp_path / "splits"
    split_dataset(dolly, write_dolly(_rows(range(100))), into)
    before = folder_digest(into)
    bad: list[Row] = [{"instruction": f"{n}?", "response": None} for n in range(3)]
    refused = tmp_path / "splits.rejected.jsonl"
    with pytest.raises(
        DataError,
        match=r"dolly: 3 of 203 rows cannot be used, more than the allowed share of 1\.00%: "
        rf"databricks-dolly-15k\.jsonl row 201: response: is null \(0\?\); .* all are in {refused}; fix them,",
    ):
        split_dataset(dolly, write_dolly([*_rows(range(200)), *bad]), into)
    assert folder_digest(into) == before
    assert [orjson.loads(line)["row"] for line in refused.read_bytes().splitlines()] == [201, 202, 203]
    split_dataset(dolly, write_dolly(_rows(range(200))), into)
    assert not refused.exists()


def test_an_empty_split_is_refused_and_the_old_splits_stay(
    dolly: DatasetSpec, write_dolly: WriteDolly, tmp_path: Path
) -> None:
    into = tmp_path / "splits"
    split_dataset(dolly, write_dolly(_rows(range(100))), into)
    before = folder_digest(into)
    with pytest.raises(DataError, match=r"dolly: the \w+ split is empty, all splits together hold 1 records; add rows"):
        split_dataset(dolly, write_dolly(_rows(range(1))), into)
    assert folder_digest(into) == before


def test_a_file_that_breaks_off_is_named_and_the_old_splits_stay(source: Path, tmp_path: Path) -> None:
    alpaca, into = DATASETS["alpaca"], tmp_path / "splits"
    raw = source / alpaca.folder
    split_dataset(alpaca, raw, into)
    before = folder_digest(into)
    path = raw / alpaca.file_names[0]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=rf"{path}: is not a complete Parquet file"):
        split_dataset(alpaca, raw, into)
    assert folder_digest(into) == before


def test_whole_conversations_stay_in_the_split_of_their_first_prompt(tmp_path: Path, source: Path) -> None:
    oasst1 = DATASETS["oasst1"]
    whole = oasst1.model_copy(update={"conversations": ConversationsSpec(context="path")})
    split_dataset(oasst1, source / oasst1.folder, tmp_path / "prompt")
    split_dataset(whole, source / oasst1.folder, tmp_path / "path")
    alone, paths = _placed(tmp_path / "prompt"), _placed(tmp_path / "path")
    assert len(alone) == len(paths)
    splits = {text: split for (text, _), split in alone.items()}
    several = {text: split for (text, _), split in paths.items() if text.startswith("User: ")}
    assert len(several) > 100
    for text, split in several.items():
        first = text.removeprefix("User: ").split("\n\nAssistant: ")[0]
        assert splits[first] == split


_KILLED = """
import sys
import time
from pathlib import Path
from fedsft_assets.data import splits
from fedsft_assets.data.splits import split_dataset
from fedsft_assets.specs.dataset import DatasetSpec, load_datasets

def stops(*arguments):
    yield from read(*arguments)
    print("written", flush=True)
    sys.stdin.read()

read = splits.read_examples
splits.read_examples = stops
dolly = load_datasets(Path(sys.argv[1]))["dolly"]
split_dataset(dolly, Path(sys.argv[2]), Path(sys.argv[3]))
"""


def test_a_process_killed_in_the_middle_of_writing_leaves_what_was_there(
    dolly: DatasetSpec, write_dolly: WriteDolly, tmp_path: Path
) -> None:
    into = tmp_path / "processed" / "dolly"
    split_dataset(dolly, write_dolly(_rows(range(100))), into)
    before = folder_digest(into)
    raw = write_dolly(_rows(range(5000)))
    command = [sys.executable, "-c", _KILLED, str(PROJECT / "datasets"), str(raw), str(into)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=PROJECT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        (half,) = into.parent.glob(".dolly.new-*")
        while not split_file(half, "training").stat().st_size:
            time.sleep(0.01)
        process.kill()
    assert folder_digest(into) == before
    report = split_dataset(dolly, raw, into)
    assert report.records == 5000
    assert [path.name for path in into.parent.iterdir()] == ["dolly"]
