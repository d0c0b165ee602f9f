"""README and the pages of docs/, and the blocks of code on them, which tests take from the pages themselves."""

import re
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

from fedsft_assets.settings import PROJECT

DOCUMENTS = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
_COMMENT = re.compile(r"(^|\s+)#\s.*")
_CONTINUED = re.compile(r"\\\n\s*")


@dataclass(frozen=True)
class Command:
    """One command of a page: what its block has exported before it, and what its comment says."""

    page: str
    exports: tuple[str, ...]
    text: str
    comment: str

    @property
    def script(self) -> str:
        return "\n".join((*self.exports, self.text))


@dataclass(frozen=True)
class Block:
    """A block of code, the page's `number`th from 1 on; `language` is "" where the page names none."""

    page: str
    number: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}-{self.number}"

    @property
    def commands(self) -> list[Command]:
        """The commands of a block of a shell that has no loops, one for each line but for exports and comments."""
        exports: list[str] = []
        found = []
        for line in _CONTINUED.sub("", self.text).splitlines():
            text = _COMMENT.sub("", line)
            if text.startswith("export "):
                exports.append(text)
            elif text:
                found.append(Command(self.page, tuple(exports), text, line.removeprefix(text).strip()))
        return found

    @property
    def exports(self) -> list[str]:
        """All that a block of a shell exports, line by line."""
        return [_COMMENT.sub("", line) for line in self.text.splitlines() if line.startswith("export ")]


def blocks(document: Path, *languages: str) -> list[Block]:
    """The blocks of a page, of these languages or of all."""
    fences = [token for token in MarkdownIt().parse(document.read_text(encoding="utf-8")) if token.type == "fence"]
    found = [Block(document.name, at, fence.info.strip(), fence.content) for at, fence in enumerate(fences, 1)]
    return [block for block in found if not languages or block.language in languages]


def spans(document: Path) -> list[str]:
    """What stands in a page's text as code, in the tables too."""
    fenceless = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", fenceless)]
