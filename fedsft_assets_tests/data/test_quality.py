"""Quality: what is wrong with splits is found, counted and shown, and nothing else."""

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from fedsft_assets.data.combine import combine
from fedsft_assets.data.quality import (
    BlankOutputs,
    Languages,
    SharedPrompt,
    blank_outputs,
    language_sample,
    prompt_overlap,
)
from fedsft_assets.data.records import DataError, Record, dump_records
from fedsft_assets.data.split_report import SplitReport
from fedsft_assets.data.splits import split_dataset
from fedsft_assets.files import file_digest
from fedsft_assets.specs.dataset import ConversationsSpec, DatasetSpec
from fedsft_assets.specs.limits import SplitSettings
from fedsft_assets.store import SPLITS, split_file
from fedsft_assets_tests.shipped import DATASETS

WriteSplits = Callable[..., Path]

_GERMAN = ("Wie koche ich Eier?", "Lege sie neun Minuten in heißes Wasser.")
_SPANISH = ("¿Cómo preparo una ensalada?", "Seca la lechuga y añade limón.")
_ENGLISH = ("How do I boil eggs?", "Put them into hot water for nine minutes.")


def _record(text: str, answer: str = "An answer.") -> Record:
    return Record(input=text, output=answer)


@pytest.fixture
def write_splits(tmp_path: Path) -> WriteSplits:
    """Writes a folder of splits that hold these records; a split that is not given has one of its own."""

    def write(name: str = "mine", **given: Iterable[Record]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        counts, files = {}, {}
        for split in SPLITS:
            records = list(given.get(split, [_record(f"Only in {split} of {name}.")]))
            path = split_file(folder, split)
            path.write_bytes(dump_records(records))
            counts[split], files[path.name] = len(records), file_digest(path)
        SplitReport.of(name, files, SplitSettings(), counts, rows=sum(counts.values()), duplicates=0).write(folder)
        return folder

    return write


def _split(source: Path, into: Path) -> list[Path]:
    """The splits of all datasets, and their union."""
    for dataset in DATASETS.values():
        split_dataset(dataset, source / dataset.folder, into / dataset.name)
    combine([into / name for name in DATASETS], into / "combined")
    return [*(into / name for name in DATASETS), into / "combined"]


def test_nothing_is_wrong_with_the_embedded_sample(source: Path, tmp_path: Path) -> None:
    folders = _split(source, tmp_path)
    assert prompt_overlap(folders).count == 0
    for folder in folders:
        assert blank_outputs(folder) == dict.fromkeys(SPLITS, BlankOutputs(0, []))
        assert language_sample(folder).counts == {"en": 500}


def test_nothing_is_wrong_with_real_rows(real_samples: Path, tmp_path: Path) -> None:
    folders = _split(real_samples, tmp_path)
    assert prompt_overlap(folders).count == 0
    for folder in folders:
        assert sum(blank.count for blank in blank_outputs(folder).values()) == 0
        assert language_sample(folder).share(["en"]) > 0.99


def test_blank_outputs_are_counted_and_the_first_lines_named(write_splits: WriteSplits) -> None:
    blanks = ["", " ", "\n\t", "\u3000", "\x1f", "\u2028", "\xa0"]
    training = [_record("1?"), *(_record(f"blank {n}?", text) for n, text in enumerate(blanks)), _record("2?", " 2 ")]
    folder = write_splits(training=training, testing=[_record("a?"), _record("b?", " ")])
    assert blank_outputs(folder) == {
        "training": BlankOutputs(7, [2, 3, 4, 5, 6]),
        "validation": BlankOutputs(0, []),
        "testing": BlankOutputs(1, [2]),
    }


def test_a_prompt_in_two_splits_of_one_folder_is_found(write_splits: WriteSplits) -> None:
    folder = write_splits(
        training=[_record("Name a fruit.", "Pear."), _record("Name a bird."), _record("Name a fruit.", "Plum.")],
        testing=[_record("Name a tree."), _record("Name a bird.", "Owl.")],
    )
    overlap = prompt_overlap([folder])
    assert overlap.count == 1
    assert overlap.examples == [SharedPrompt("Name a bird.", ["mine/training", "mine/testing"])]


def test_the_same_words_are_the_same_prompt(write_splits: WriteSplits) -> None:
    one = write_splits("one", training=[_record("Add both.\n\nTo SEVEN  é.")])
    two = write_splits("two", validation=[_record("to seven e\u0301.\tadd BOTH. ")])
    other = write_splits("other", testing=[_record("Add both both to seven é.")])
    overlap = prompt_overlap([one, two, other])
    assert overlap.count == 1
    assert overlap.examples == [SharedPrompt("Add both.\n\nTo SEVEN  é.", ["one/training", "two/validation"])]


def test_folders_may_share_prompts_in_the_same_split(write_splits: WriteSplits) -> None:
    shared = [_record(f"Say {n}.") for n in range(3000)]
    one, two = (write_splits(name, training=shared) for name in ("one", "two"))
    assert prompt_overlap([one, two]).count == 0


def test_prompts_that_datasets_share_across_splits_are_found_through_combined_too(write_splits: WriteSplits) -> None:
    shared = [_record(f"Say {n}, please, and then say it again, {'slowly, ' * 9}if you can.") for n in range(2000)]
    one = write_splits("one", training=shared)
    two = write_splits("two", training=[_record("Say nothing.")], validation=shared[100:])
    combine([one, two], one.parent / "combined")
    overlap = prompt_overlap([one, two, one.parent / "combined"])
    assert overlap.count == 1900
    assert len(overlap.examples) == 5
    for prompt in overlap.examples:
        assert prompt.places == ["one/training", "two/validation", "combined/training", "combined/validation"]
        assert len(prompt.text) == 61
        assert any(record["input"].startswith(prompt.text[:-1]) for record in shared[100:])


def test_splits_made_with_different_seeds_share_prompts(source: Path, tmp_path: Path, dolly: DatasetSpec) -> None:
    raw = source / dolly.folder
    split_dataset(dolly, raw, tmp_path / "one")
    split_dataset(dolly, raw, tmp_path / "two", SplitSettings(seed=7))
    assert prompt_overlap([tmp_path / "one"]).count == prompt_overlap([tmp_path / "two"]).count == 0
    assert prompt_overlap([tmp_path / "one", tmp_path / "two"]).count > 50


def test_whole_conversations_share_no_prompt(source: Path, tmp_path: Path) -> None:
    oasst1 = DATASETS["oasst1"]
    whole = oasst1.model_copy(update={"conversations": ConversationsSpec(context="path")})
    split_dataset(whole, source / oasst1.folder, tmp_path / "path")
    split_dataset(oasst1, source / oasst1.folder, tmp_path / "prompt")
    assert prompt_overlap([tmp_path / "path"]).count == 0
    assert prompt_overlap([tmp_path / "prompt"]).count == 0


def test_languages_are_told_apart(write_splits: WriteSplits) -> None:
    languages = {_GERMAN: 5, _SPANISH: 3, _ENGLISH: 2}
    records = [_record(f"{text} {n}", answer) for (text, answer), count in languages.items() for n in range(count)]
    found = language_sample(write_splits(training=records))
    assert found.counts == {"de": 5, "es": 3, "en": 2 + 2}
    assert found.share(["de", "es"]) == pytest.approx(8 / 12)
    assert found.share(["en", "de", "en"]) == pytest.approx(9 / 12)


def test_the_sample_is_spread_evenly_over_the_splits(write_splits: WriteSplits) -> None:
    german = [_record(f"{_GERMAN[0]} {n}", _GERMAN[1]) for n in range(800)]
    english = [_record(f"{_ENGLISH[0]} {n}", _ENGLISH[1]) for n in range(100)]
    spanish = [_record(f"{_SPANISH[0]} {n}", _SPANISH[1]) for n in range(100)]
    folder = write_splits(training=german, validation=english, testing=spanish)
    assert language_sample(folder, records=50).counts == {"de": 40, "en": 5, "es": 5}
    assert language_sample(folder, records=50) == language_sample(folder, records=50)


def test_records_without_words_count_for_no_language() -> None:
    assert Languages({"en": 3, "de": 1, "zxx": 6}).share(["en"]) == 0.75
    assert Languages({"zxx": 6}).share(["en"]) == 1
    assert Languages({"de": 6}).share(["en"]) == 0


@pytest.mark.parametrize("look", [blank_outputs, language_sample, lambda folder: prompt_overlap([folder])])
def test_a_split_that_cannot_be_read_is_named(look: Callable[[Path], object], write_splits: WriteSplits) -> None:
    folder = write_splits()
    path = split_file(folder, "testing")
    path.write_bytes(b'{"input": "a", "outp')
    with pytest.raises(DataError, match=rf"{path}: line 1: is not JSON"):
        look(folder)
