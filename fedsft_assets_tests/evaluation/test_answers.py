"""The table of answers: real ones of real archives, and texts that would break a table."""

from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt

from fedsft_assets.evaluation.answers import Answers, answer
from fedsft_assets.evaluation.prompts import ExamplePrompt
from fedsft_assets.model.base_model import create_base_model
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.generation_settings import GenerationSettings
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.specs.model_preset import PRESETS

PROMPTS = [ExamplePrompt(question="What is 2 | 3?"), ExamplePrompt(question="Why?", context="It is so.\nIt was so.")]
GREEDY = GenerationSettings(max_new_tokens=8)
MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


class _Cells(HTMLParser):
    """The rows of the tables in a page, each cell as what a reader sees of it, and the other elements in them."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.elements: set[str] = set()
        self.tables = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002 the parser's name
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
        elif tag == "br":
            self.rows[-1][-1] += "\n"
        else:
            self.elements.add(tag)
            self.tables += tag == "table"

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1] and self.tables and "\n" not in data:
            self.rows[-1][-1] += data


def _table(markdown: str) -> _Cells:
    cells = _Cells()
    cells.feed(MARKDOWN.render("".join(f"{line}\n" for line in markdown.splitlines() if line.startswith("|"))))
    return cells


def test_one_row_for_each_model_and_one_column_for_each_prompt() -> None:
    table = _table(Answers(PROMPTS, {"base model": ["a", "b"], "fedavg": ["c", "d"]}, GREEDY).markdown())
    assert table.tables == 1
    assert table.rows == [
        ["", "What is 2 | 3?", "Why?"],
        ["base model", "a", "b"],
        ["fedavg", "c", "d"],
        ["asked after", "", "It is so.\nIt was so."],
    ]


def test_no_row_of_contexts_where_there_are_none() -> None:
    table = _table(Answers(PROMPTS[:1], {"fedavg": ["c"]}, GREEDY).markdown())
    assert [row[0] for row in table.rows] == ["", "fedavg"]


@pytest.mark.parametrize(
    "text",
    [
        "a | b || c",
        "| --- | --- |",
        "\\| \\\\ \\",
        "*bold* **bold** _it_ __it__ ~~gone~~ a*b_c",
        "`code` ``` a|b ```",
        "<b>bold</b> <br> <script>alert(1)</script> <!-- a --> 1 < 2 > 1",
        "![picture](http://example.org/a.png) [link](b) [c]: d <http://example.org>",
        "&amp; &lt; &#35; & $x$",
        "# title",
        "- item",
        "1. item",
        "> quote",
        "日本 🚀 ü",
        "one\ntwo\n\nfour",
    ],
)
def test_a_text_is_shown_as_it_is(text: str) -> None:
    table = _table(Answers(PROMPTS[:1], {"fedavg": [text], "other": ["fine"]}, GREEDY).markdown())
    assert table.rows[1:] == [["fedavg", text], ["other", "fine"]]
    assert table.elements <= {"table", "thead", "tbody"}


def test_control_characters_do_not_reach_the_page() -> None:
    markdown = Answers(PROMPTS[:1], {"fedavg": ["a\x1b[31mb\x00c\x07"]}, GREEDY).markdown()
    assert all(character.isprintable() or character == "\n" for character in markdown)
    assert _table(markdown).rows[1][1] == "a\ufffd[31mb\ufffdc\ufffd"


@pytest.mark.parametrize("text", ["", "\n"])
def test_an_answer_without_text_says_so(text: str) -> None:
    table = _table(Answers(PROMPTS[:1], {"fedavg": [text]}, GREEDY).markdown())
    assert table.rows[1] == ["fedavg", "(no text)"]


def test_how_the_answers_were_made_is_said() -> None:
    models = {"fedavg": ["a"]}
    assert Answers(PROMPTS[:1], models, GREEDY).markdown().endswith("\n\nGreedy, at most 8 new tokens.")
    sampled = GenerationSettings(max_new_tokens=9, temperature=0.7, seed=3)
    assert (
        Answers(PROMPTS[:1], models, sampled)
        .markdown()
        .endswith("\n\nSampled at temperature 0.7 with seed 3, at most 9 new tokens.")
    )


def test_file_holds_what_is_shown(tmp_path: Path) -> None:
    answers = Answers(PROMPTS, {"fedavg": ["c", "ü\nd"]}, GREEDY)
    answers.write(tmp_path / "reports" / "inference.md")
    assert (tmp_path / "reports" / "inference.md").read_text(encoding="utf-8") == answers.markdown() + "\n"


def test_answers_are_read_as_they_were_written(tmp_path: Path) -> None:
    settings = GenerationSettings(max_new_tokens=9, temperature=0.7, seed=3)
    answers = Answers(PROMPTS, {"fedavg": ["c", "ü\nd"]}, settings, {"fedavg": "a" * 64})
    answers.write_json(tmp_path / "inference.json")
    assert Answers.read_json(tmp_path / "inference.json") == answers


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("archives")
    for seed in (1, 2):
        create_base_model(PRESETS["tiny"], folder / f"{seed}.nemo", seed, ["What is 2 | 3?", "It is so. Why?"])
    return {"base model": folder / "1.nemo", "fedavg": folder / "2.nemo"}


@pytest.mark.parametrize(
    "settings", [GREEDY, GenerationSettings(8, temperature=1.0, seed=3)], ids=["greedy", "sampled"]
)
def test_every_archive_answers_every_prompt_with_its_context(
    archives: dict[str, Path], settings: GenerationSettings
) -> None:
    answers = answer(archives, PROMPTS, settings)
    assert list(answers.models) == ["base model", "fedavg"]
    for name, path in archives.items():
        expected = LanguageModel.load(path).generate(["What is 2 | 3?", "It is so.\nIt was so.\n\nWhy?"], settings)
        assert answers.models[name] == expected
    assert answer(archives, PROMPTS, settings) == answers


def test_missing_archive_is_named(archives: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"{tmp_path}/model.nemo"):
        answer({**archives, "combined": tmp_path / "model.nemo"}, PROMPTS, GREEDY)
