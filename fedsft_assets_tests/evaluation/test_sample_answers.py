"""The fixed sample of the testing split, and how answers to it are scored."""

from pathlib import Path

import pytest

from fedsft_assets.data.records import Record, dump_records
from fedsft_assets.evaluation.record_scores import Evaluation
from fedsft_assets.evaluation.sample_answers import (
    SAMPLE_FILE,
    AnswerScores,
    SampleAnswer,
    read_answers,
    rouge_l,
    sample,
    scores_table,
    write_answers,
)

RECORDS = [Record(input=f"What is {number}?", output=str(number)) for number in range(50)]


def _answer(record: Record, text: str) -> SampleAnswer:
    return SampleAnswer("a" * 16, record["input"], record["output"], text)


def _split(folder: Path, records: list[Record]) -> Path:
    folder.mkdir()
    (folder / "testing.jsonl").write_bytes(dump_records(records))
    return folder


def test_sample_is_the_same_whatever_the_order_of_the_records(tmp_path: Path) -> None:
    one, other = _split(tmp_path / "one", RECORDS), _split(tmp_path / "other", RECORDS[::-1])
    found = sample(one)
    assert len(found) == 20
    assert list(found.items()) == list(sample(other).items())
    assert list(found) == sorted(found)
    assert all(record in RECORDS for record in found.values())


def test_new_records_leave_those_of_the_sample_that_stay_in_it_in_place(tmp_path: Path) -> None:
    few = sample(_split(tmp_path / "few", RECORDS[:40]))
    more = sample(_split(tmp_path / "more", RECORDS))
    assert [digest for digest in more if digest in few] == [digest for digest in few if digest in more]
    assert len(more.keys() & few.keys()) > 10


def test_sample_of_a_small_split_is_all_of_it(tmp_path: Path) -> None:
    assert len(sample(_split(tmp_path / "small", RECORDS[:3]))) == 3


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("The cat sat on the mat.", "the cat sat on the mat", 1.0),
        ("the cat sat on the mat", "the mat", 2 * 1 * (2 / 6) / (1 + 2 / 6)),  # precision 2/2, recall 2/6
        ("police killed the gunman", "police kill the gunman", 0.75),  # Lin 2004, section 3
        ("police killed the gunman", "the gunman kill police", 0.5),
        ("a", "", 0.0),
        ("слово дело", "слово", 2 * 1 * 0.5 / 1.5),
    ],
)
def test_rouge_l_is_that_of_the_paper(reference: str, answer: str, expected: float) -> None:
    assert rouge_l(reference, answer) == pytest.approx(expected)


def test_words_of_english_texts_are_those_of_the_package() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    texts = [("It's 3.5 °C, isn't it? (Yes: state-of-the-art!)", "it s 3 5 isnt the art"), ("A\nB  C", "a b_c")]
    for reference, answer in texts:
        package = RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
        assert rouge_l(reference, answer) == pytest.approx(package)


def test_answer_is_exact_but_for_white_space_at_its_ends() -> None:
    record = Record(input="Capital of Norway?", output="Oslo.\n")
    assert _answer(record, " Oslo.").exact
    assert not _answer(record, "oslo.").exact


def test_answers_are_read_by_model_and_earlier_evaluations_have_none(tmp_path: Path) -> None:
    answers = [_answer(RECORDS[1], "1"), _answer(RECORDS[2], "<script>ü")]
    for model in ("base_model", "fedavg"):
        folder = tmp_path / model
        folder.mkdir()
        Evaluation(model, "d" * 64, "t" * 64, 256).write(folder)
    write_answers(answers, tmp_path / "fedavg")
    assert (tmp_path / "fedavg" / SAMPLE_FILE).exists()
    assert read_answers([tmp_path / "base_model", tmp_path / "fedavg"]) == {"fedavg": answers}


def test_scores_are_means_over_the_sample() -> None:
    answers = [_answer(RECORDS[1], "1"), _answer(RECORDS[2], "3")]
    assert AnswerScores.of(answers) == (0.5, 0.5)
    assert "| fedavg" in (table := scores_table({"fedavg": answers}))
    assert table.splitlines()[2].split("|")[2:4] == ["          0.50 ", "     0.500 "]
