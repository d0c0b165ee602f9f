"""Templates that turn a record's input and output into the model's prompt and answer."""

from dataclasses import dataclass

from fedsft_assets.model.errors import ModelError


@dataclass(frozen=True)
class PromptTemplate:
    """A text with `{input}` and, at its end, `{output}`, like NeMo's `prompt_template`."""

    text: str

    def prompt(self, text: str) -> str:
        """The prompt: the text before the answer, without the space before `{output}`."""
        return self.text.removesuffix("{output}").removesuffix(" ").replace("{input}", text)

    def answer(self, text: str) -> str:
        """The answer, with the space before `{output}`, if any."""
        return (" " if self.text.endswith(" {output}") else "") + text


DEFAULT_TEMPLATE = "answer"
TEMPLATES = {
    # Only four tokens in the tiny vocabulary, and it marks where the answer starts.
    "answer": PromptTemplate("{input}\n\nAnswer: {output}"),
    # The default of NeMo's GPT fine-tuning configuration, for models that were tuned with it.
    "nemo": PromptTemplate("{input} {output}"),
}


def template(name: str) -> PromptTemplate:
    """The prompt template of that name. Raises ModelError if there is none."""
    if name not in TEMPLATES:
        raise ModelError(f"prompt_template: {name!r} is not one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
