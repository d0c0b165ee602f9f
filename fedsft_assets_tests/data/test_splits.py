"""Splits: faithful records, placed by content alone."""

import json
import random
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fedsft_assets.data.records import DataError, Example, Record, read_records
from fedsft_assets.data.sources import DATASETS, Dataset
from fedsft_assets.data.splits import combine, normalize_prompt, split_dataset, to_record
from fedsft_assets.store import SPLITS, folder_digest, split_file
from fedsft_assets_tests.data.conftest import Row, WriteDolly

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
    dataset: Dataset, real_samples: Path, tmp_path: Path
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
def test_splitting_twice_gives_the_same_bytes(dataset: Dataset, real_samples: Path, tmp_path: Path) -> None:
    first = split_dataset(dataset, real_samples / dataset.folder, tmp_path / "first")
    second = split_dataset(dataset, real_samples / dataset.folder, tmp_path / "second")
    assert first == second
    for split in SPLITS:
        paths = (split_file(tmp_path / name, split) for name in ("first", "second"))
        assert len({path.read_bytes() for path in paths}) == 1


def test_new_rows_never_move_old_rows_between_splits(dolly: Dataset, write_dolly: WriteDolly, tmp_path: Path) -> None:
    split_dataset(dolly, write_dolly(_rows(range(500))), tmp_path / "old")
    rows = _rows(range(1500))
    random.Random(0).shuffle(rows)
    split_dataset(dolly, write_dolly(rows), tmp_path / "new")
    old, new = _placed(tmp_path / "old"), _placed(tmp_path / "new")
    assert len(old) == 500
    assert old.items() <= new.items()


def test_splits_hold_their_proportions(dolly: Dataset, write_dolly: WriteDolly, tmp_path: Path) -> None:
    raw = write_dolly(_rows(range(10_000)))
    for proportions in ((0.8, 0.1, 0.1), (0.6, 0.3, 0.1)):
        report = split_dataset(dolly, raw, tmp_path / "splits", proportions=proportions)
        for split, proportion in zip(SPLITS, proportions, strict=True):
            assert report.counts[split] / 10_000 == pytest.approx(proportion, abs=0.01)


def test_the_seed_decides_which_split(dolly: Dataset, write_dolly: WriteDolly, tmp_path: Path) -> None:
    raw = write_dolly(_rows(range(300)))
    split_dataset(dolly, raw, tmp_path / "one", seed=1)
    split_dataset(dolly, raw, tmp_path / "two", seed=2)
    one, two = (
        {frozenset(pair[0].split()): split for pair, split in _placed(tmp_path / n).items()} for n in ("one", "two")
    )
    assert one.keys() == two.keys()
    assert one != two


def test_the_same_prompt_falls_into_the_same_split_however_it_is_written(
    dolly: Dataset, write_dolly: WriteDolly, tmp_path: Path
) -> None:
    rows: list[Row] = [{"instruction": f"Add {n}.", "context": f"To {n}.", "response": "a"} for n in range(200)]
    again: list[Row] = [{"instruction": f" to  {n}.", "context": f"ADD\n{n}. ", "response": "b"} for n in range(200)]
    split_dataset(dolly, write_dolly(rows), tmp_path / "one")
    split_dataset(dolly, write_dolly(again), tmp_path / "two")
    one, two = (
        {normalize_prompt(text): split for (text, _), split in _placed(tmp_path / name).items()}
        for name in ("one", "two")
    )
    assert len(one) == 200
    assert one == two


def test_instruction_and_context_come_in_either_order_decided_by_content() -> None:
    examples = [Example(f"Ask {n}?", f"Context {n}.", "answer") for n in range(1000)]
    records = [to_record(example, seed=1) for example in examples]
    assert records == [to_record(example, seed=1) for example in examples]
    assert records != [to_record(example, seed=2) for example in examples]
    first = Counter(record["input"].startswith("Ask") for record in records)
    assert first[True] == pytest.approx(500, abs=60)
    assert records[7]["input"] in ("Ask 7?\n\nContext 7.", "Context 7.\n\nAsk 7?")


def test_parts_are_stripped_where_they_are_joined_and_nothing_else_is_touched() -> None:
    joined = to_record(Example(" Ask?\n", "\n Context. ", " answer\n"), seed=1)
    assert joined["input"] in ("Ask?\n\nContext.", "Context.\n\nAsk?")
    assert joined["output"] == " answer\n"
    assert to_record(Example(" Ask?\n", " ", "answer"), seed=1) == Record(input=" Ask?\n", output="answer")


def test_blank_rows_and_exact_duplicates_are_dropped_and_counted(
    dolly: Dataset, write_dolly: WriteDolly, tmp_path: Path
) -> None:
    blank: list[Row] = [
        {"instruction": " \n", "context": "a", "response": "b"},
        {"instruction": "a", "response": ""},
        {"instruction": None, "response": "b"},
    ]
    same_prompt: list[Row] = [{"instruction": "What is 4 plus one?", "response": "five"}]
    report = split_dataset(
        dolly, write_dolly([*_rows(range(100)), *blank, *_rows(range(9)), *same_prompt]), tmp_path / "s"
    )
    assert (report.records, report.duplicates, report.rejected) == (101, 9, 3)
    assert report.digest == folder_digest(tmp_path / "s")
    assert report.max_input_chars == len("What is 99 plus one?\n\nPassage 99.")
    assert report.as_metadata()["records"] == 101


def test_an_empty_split_is_refused_and_the_old_splits_stay(
    dolly: Dataset, write_dolly: WriteDolly, tmp_path: Path
) -> None:
    into = tmp_path / "splits"
    digest = split_dataset(dolly, write_dolly(_rows(range(100))), into).digest
    with pytest.raises(DataError, match=r"dolly: the \w+ split is empty, all splits together hold 1 records; add rows"):
        split_dataset(dolly, write_dolly(_rows(range(1))), into)
    assert folder_digest(into) == digest


def test_a_broken_line_is_named_and_the_old_splits_stay(
    dolly: Dataset, write_dolly: WriteDolly, tmp_path: Path
) -> None:
    into = tmp_path / "splits"
    raw = write_dolly(_rows(range(100)))
    digest = split_dataset(dolly, raw, into).digest
    with (raw / dolly.files[0]).open("a") as file:
        file.write('\n{"instruction": "a", "resp')
    with pytest.raises(DataError, match=r"databricks-dolly-15k\.jsonl: line 101: is not JSON"):
        split_dataset(dolly, raw, into)
    assert folder_digest(into) == digest


@pytest.mark.parametrize("proportions", [(0.8, 0.1, 0.2), (1.0, 0.0, 0.0), (0.5, 0.5)])
def test_impossible_proportions_are_refused(dolly: Dataset, tmp_path: Path, proportions: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match="proportions: expected 3 positive shares that add up to 1"):
        split_dataset(dolly, tmp_path, tmp_path / "splits", proportions=proportions)  # type: ignore[arg-type]


def test_combined_is_the_shuffled_union_of_the_same_splits(real_samples: Path, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in DATASETS]
    for dataset, folder in zip(DATASETS.values(), folders, strict=True):
        split_dataset(dataset, real_samples / dataset.folder, folder)
    report = combine(folders, tmp_path / "combined")
    union: dict[tuple[str, str], str] = {}
    for folder in folders:
        union |= _placed(folder)
    assert _placed(tmp_path / "combined") == union
    assert report.records == len(union)
    assert report.digest == folder_digest(tmp_path / "combined")
    assert combine(folders[::-1], tmp_path / "again").digest == report.digest
    assert combine(folders, tmp_path / "other", seed=7).digest != report.digest
    alpaca = {(record["input"], record["output"]) for record in read_records(split_file(folders[0], "training"))}
    combined = read_records(split_file(tmp_path / "combined", "training"))
    half = sum((record["input"], record["output"]) in alpaca for record in combined[: len(combined) // 2])
    assert half / len(alpaca) == pytest.approx(0.5, abs=0.1)


def test_combining_drops_what_two_datasets_share_and_counts_it(
    dolly: Dataset, write_dolly: WriteDolly, tmp_path: Path
) -> None:
    split_dataset(dolly, write_dolly(_rows(range(200))), tmp_path / "one")
    split_dataset(dolly, write_dolly(_rows(range(150, 400))), tmp_path / "two")
    report = combine([tmp_path / "one", tmp_path / "two"], tmp_path / "combined")
    assert (report.records, report.duplicates) == (400, 50)


def test_combining_names_a_missing_split(dolly: Dataset, write_dolly: WriteDolly, tmp_path: Path) -> None:
    split_dataset(dolly, write_dolly(_rows(range(200))), tmp_path / "one")
    split_file(tmp_path / "one", "validation").unlink()
    with pytest.raises(DataError, match=r"one/validation\.jsonl: cannot be read"):
        combine([tmp_path / "one"], tmp_path / "combined")
    assert not (tmp_path / "combined").exists()
