"""Example prompts from a YAML file, given to every model of a study to compare their answers."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from fedsft_assets.specs.yaml_file import read_yaml, validated

_Text = Annotated[str, StringConstraints(strip_whitespace=True)]


class ExamplePrompt(BaseModel):
    """A question, with an optional context."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: Annotated[_Text, Field(min_length=1)]
    context: _Text = ""

    @property
    def text(self) -> str:
        """The model's input: context and question joined by a blank line, as in a record."""
        return f"{self.context}\n\n{self.question}" if self.context else self.question


class _PromptFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: Annotated[list[ExamplePrompt], Field(min_length=1)]


def load_prompts(path: Path) -> list[ExamplePrompt]:
    """Read a file like prompts.yaml. Raises SpecError with one line per invalid field."""
    return parse_prompts(path, read_yaml(path, "'prompts:'"))


def parse_prompts(source: Path, content: dict[str, Any]) -> list[ExamplePrompt]:
    """Validate the content of such a file; `source` names it in errors. Raises SpecError as `load_prompts` does."""
    return validated(_PromptFile, source, content).prompts
