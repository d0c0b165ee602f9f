"""Example prompts from a YAML file: what every model of a study is asked, so that answers can be read side by side."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from fedsft_assets.specs.yaml_file import read_yaml, validated

_Text = Annotated[str, StringConstraints(strip_whitespace=True)]


class ExamplePrompt(BaseModel):
    """A question, and the text that it is about, if any."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    question: Annotated[_Text, Field(min_length=1)]
    context: _Text = ""

    @property
    def text(self) -> str:
        """What a model is given: joined by a blank line, as instruction and context of a record are."""
        return f"{self.context}\n\n{self.question}" if self.context else self.question


class _PromptFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: Annotated[list[ExamplePrompt], Field(min_length=1)]


def load_prompts(path: Path) -> list[ExamplePrompt]:
    """The prompts of a file like prompts.yaml. Raises SpecError with one line for each field that is wrong."""
    return parse_prompts(path, read_yaml(path, "'prompts:'"))


def parse_prompts(source: Path, content: dict[str, Any]) -> list[ExamplePrompt]:
    """The prompts of what such a file says, or something else that `source` names; errors as of `load_prompts`."""
    return validated(_PromptFile, source, content).prompts
