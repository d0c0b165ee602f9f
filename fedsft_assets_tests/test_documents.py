"""README and docs: every link leads somewhere, and every module that a command names is there."""

import importlib.util
import itertools
import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from fedsft_assets.settings import PROJECT

DOCUMENTS = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
LONGEST_README = 200


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


def test_readme_is_short_and_leads_to_every_page() -> None:
    readme = PROJECT / "README.md"
    assert len(readme.read_text().splitlines()) <= LONGEST_README
    pages = {(readme.parent / link.partition("#")[0]).resolve() for link in _links(readme)}
    assert pages >= set(DOCUMENTS) - {readme}
