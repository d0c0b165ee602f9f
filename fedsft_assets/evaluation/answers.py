"""The answers of several models to the same prompts, side by side in one Markdown table, and as JSON."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from fedsft_assets.evaluation.prompts import ExamplePrompt
from fedsft_assets.files import publish_file
from fedsft_assets.model.generation_settings import GenerationSettings

ANSWERS_FILE = "inference.json"
_NO_TEXT = "*(no text)*"
_MARKUP = re.compile(r"[\\`*_\[\]<>|~&$]")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f]")


@dataclass(frozen=True)
class Answers:
    """The answers of each model, by name, to each of the prompts.

    `versions` are the names of the versions of those models that are jobs' checkpoints.
    """

    prompts: Sequence[ExamplePrompt]
    models: Mapping[str, Sequence[str]]
    settings: GenerationSettings
    versions: Mapping[str, str] = field(default_factory=dict)

    def markdown(self) -> str:
        """A table with a row per model and a column per prompt, markup escaped; contexts in the last row."""
        rows = [["", *(_cell(prompt.question) for prompt in self.prompts)], [":---"] * (len(self.prompts) + 1)]
        rows += [[_cell(name), *map(_cell, answers)] for name, answers in self.models.items()]
        if any(prompt.context for prompt in self.prompts):
            rows.append(
                ["*asked after*", *(_cell(prompt.context) if prompt.context else "" for prompt in self.prompts)]
            )
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return f"{table}\n\n{self.how}."

    def write(self, path: Path) -> None:
        """Write the table as a Markdown file."""
        with publish_file(path) as fresh:
            fresh.write_text(self.markdown() + "\n", encoding="utf-8")

    def write_json(self, path: Path) -> None:
        """Write all of it for `read_json`."""
        prompts = [prompt.model_dump() for prompt in self.prompts]
        content = {**asdict(self), "prompts": prompts}
        with publish_file(path) as fresh:
            fresh.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read_json(cls, path: Path) -> Self:
        content = json.loads(path.read_text(encoding="utf-8"))
        prompts = [ExamplePrompt(**prompt) for prompt in content["prompts"]]
        return cls(prompts, content["models"], GenerationSettings(**content["settings"]), content["versions"])

    @property
    def how(self) -> str:
        """How the answers were made."""
        most = f"at most {self.settings.max_new_tokens} new tokens"
        if not self.settings.temperature:
            return f"Greedy, {most}"
        return f"Sampled at temperature {self.settings.temperature:g} with seed {self.settings.seed}, {most}"


def answer(archives: Mapping[str, Path], prompts: Sequence[ExamplePrompt], settings: GenerationSettings) -> Answers:
    """Load one archive at a time and generate its answers to all prompts, with its own prompt template.

    Raises ModelError naming an archive that is missing or cannot be restored.
    """
    from fedsft_assets.model.language_model import LanguageModel

    texts = [prompt.text for prompt in prompts]
    models = {name: LanguageModel.load(path).generate(texts, settings) for name, path in archives.items()}
    return Answers(prompts, models, settings)


def _cell(text: str) -> str:
    """Text as a table cell, with all markup escaped."""
    shown = _CONTROL.sub("\ufffd", text)
    return "<br>".join(_MARKUP.sub(r"\\\g<0>", line) for line in shown.splitlines()) or _NO_TEXT
