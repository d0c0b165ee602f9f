"""README and docs: every link leads somewhere, and every module, program, target and variable that they name is there.

That blocks of code do what pages say is shown elsewhere: files and settings in `test_document_files`, commands and
Python in `end_to_end/test_document_commands`, docs/production.md in `end_to_end/test_production_document`.
"""

import importlib
import importlib.util
import itertools
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from fedsft_assets.settings import PROJECT
from fedsft_assets_tests.documents import DOCUMENTS, blocks, spans

LONGEST_README = 200
# A block in another language, or in none, is one that no test takes.
TESTED_LANGUAGES = {"bash", "python", "yaml", "nginx"}
DRAWINGS = {"architecture.md": 1, "production.md": 1}  # processes; the files of a site
_VARIABLES = re.compile(r"\bFEDSFT_[A-Z_]*[A-Z]\b")
_PROGRAM = re.compile(r"(?:\S+/bin/)?(fedsft(?:-[a-z]+)?)(?: (.*))?")
_TARGET = re.compile(r"(?:[A-Z_]+=\S+ )*make ([a-z-]+)")


def _links(document: Path) -> list[str]:
    """Targets of all links and pictures that are not on the web."""
    tokens = [child for token in MarkdownIt().parse(document.read_text()) for child in token.children or []]
    tables = re.findall(r"\]\(([^)\s]+)\)", document.read_text())  # which plain Markdown does not know
    found = [str(token.attrs.get("href") or token.attrs.get("src")) for token in tokens if token.attrs]
    return [link for link in {*found, *tables} if not link.startswith(("http://", "https://"))]


def _anchors(document: Path) -> set[str]:
    """Of headings, as GitHub makes them."""
    tokens = MarkdownIt().parse(document.read_text())
    headings = [text.content for mark, text in itertools.pairwise(tokens) if mark.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    for link in _links(document):
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), link
        if anchor:
            assert anchor in _anchors(target), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_module_that_a_command_names_is_there(document: Path) -> None:
    for module in re.findall(r"-m ((?:fedsft_assets|benchmarks)[\w.]*)", document.read_text()):
        assert importlib.util.find_spec(module), module


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_block_is_in_a_language_whose_blocks_are_tested(document: Path) -> None:
    untested = [block for block in blocks(document) if block.language not in TESTED_LANGUAGES]
    drawings = [block for block in untested if block.language == "text"]
    assert untested == drawings
    assert len(drawings) == DRAWINGS.get(document.name, 0)


@pytest.fixture
def helped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command of the project's says of itself, or of one of its subcommands."""
    scripts = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["scripts"]

    def ask(program: str, *subcommand: str) -> str:
        module, function = scripts[program].split(":")
        run = getattr(importlib.import_module(module), function)
        monkeypatch.setattr("sys.argv", [program, *subcommand, "--help"])
        with pytest.raises(SystemExit) as end:
            run()
        assert end.value.code == 0, (program, *subcommand)
        return capsys.readouterr().out

    return ask


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_in_a_sentence_is_one_of_the_projects(document: Path, helped: Callable[..., str]) -> None:
    for program, words in [found.groups() for span in spans(document) if (found := _PROGRAM.fullmatch(span))]:
        said = (words or "").split()
        subcommand = [] if program == "fedsft-generate" else said[: 2 if said[:1] == ["poc"] else 1]
        text = helped(program, *subcommand)
        assert [word for word in said if word.startswith("--") and word not in text] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_target_of_make_in_a_sentence_is_in_the_makefile(document: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.MULTILINE))
    named = {found[1] for span in spans(document) if (found := _TARGET.match(span))}
    assert named - targets == set()


def test_every_variable_of_the_projects_is_one_that_it_reads(settings_variables: set[str]) -> None:
    code = [path.read_text() for path in (PROJECT / "fedsft_assets").rglob("*.py")]
    read = settings_variables | {name for text in code for name in _VARIABLES.findall(text)}
    for document in DOCUMENTS:
        assert set(_VARIABLES.findall(document.read_text())) - read == set(), document.name


@pytest.fixture
def settings_variables() -> set[str]:
    """The names of all settings in the environment."""
    from pydantic import BaseModel

    from fedsft_assets.settings import Settings

    def names(model: type[BaseModel], beginning: str) -> set[str]:
        found = set()
        for name, field in model.model_fields.items():
            variable = f"{beginning}{name.upper()}"
            nested = isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
            found |= {variable, *(names(field.annotation, f"{variable}__") if nested else ())}
        return found

    return names(Settings, "FEDSFT_")


def test_readme_is_short_and_leads_to_every_page() -> None:
    readme = PROJECT / "README.md"
    assert len(readme.read_text().splitlines()) <= LONGEST_README
    pages = {(readme.parent / link.partition("#")[0]).resolve() for link in _links(readme)}
    assert pages >= set(DOCUMENTS) - {readme}
