"""The prompts' file: the two that are shipped, files of the user's own, and files that are wrong."""

from pathlib import Path

import pytest

from fedsft_assets.evaluation.prompts import ExamplePrompt, load_prompts
from fedsft_assets.settings import Settings
from fedsft_assets.specs.yaml_file import SpecError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "prompts.yaml"


def test_shipped_prompts_are_those_of_the_published_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDSFT_PROMPTS", raising=False)
    fact, question = load_prompts(Settings().prompts)
    assert fact.text == "Tell me an interesting fact about space travel."
    assert question.question == "Which NFL team represented the AFC at Super Bowl 50?"
    assert question.context.startswith("Super Bowl 50 was an American football game to determine the champion of the ")
    assert "Denver Broncos defeated the National Football Conference (NFC) champion Carolina Panthers 24–10" in (
        question.context
    )
    assert question.context.endswith("so that the logo could prominently feature the Arabic numerals 50.")
    assert "\n" not in question.context
    assert question.text == f"{question.context}\n\n{question.question}"


def test_a_file_of_the_users_own_is_named_by_a_variable(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("prompts:\n  - question: ' Ja oder nein? '\n  - {question: 'Why?', context: It is so.}\n")
    monkeypatch.setenv("FEDSFT_PROMPTS", str(file))
    assert load_prompts(Settings().prompts) == [
        ExamplePrompt(question="Ja oder nein?"),
        ExamplePrompt(question="Why?", context="It is so."),
    ]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("prompts: []", "prompts: List should have at least 1 item .*, found []"),
        ("prompts:\n  - context: a", "prompts.0.question: Field required"),
        ("prompts:\n  - question: '  '", "prompts.0.question: String should have at least 1 character, found '  '"),
        ("prompts:\n  - {question: a, answer: b}", "prompts.0.answer: Extra inputs are not permitted, found 'b'"),
        ("prompts:\n  - Why?", "prompts.0: .*, found 'Why?'"),
        ("questions: [a]", "questions: Extra inputs are not permitted, found ['a']"),
        ("- Why?", "expected fields like 'prompts:', found list"),
        ("prompts: [", "is not YAML"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_name_and_field(file: Path, content: str, said: str) -> None:
    file.write_text(content)
    with pytest.raises(SpecError) as error:
        load_prompts(file)
    before, _, after = said.partition(".*")
    [line] = [line for line in str(error.value).splitlines() if line.startswith(f"{file}: {before}")]
    assert after in line


def test_a_missing_file_is_named(file: Path) -> None:
    with pytest.raises(SpecError, match=f"{file}: cannot be read: No such file"):
        load_prompts(file)
