"""How a record's input and output become the prompt that a model is given and the answer that it learns."""

from dataclasses import dataclass

from fedsft_assets.model.errors import ModelError


@dataclass(frozen=True)
class PromptTemplate:
    """A text with `{input}` and, at its end, `{output}`; NeMo's `prompt_template` means the same."""

    text: str

    def prompt(self, text: str) -> str:
        """What the model is given: all before the answer, without the space that the answer begins with."""
        return self.text.removesuffix("{output}").removesuffix(" ").replace("{input}", text)

    def answer(self, text: str) -> str:
        return (" " if self.text.endswith(" {output}") else "") + text


DEFAULT_TEMPLATE = "answer"
TEMPLATES = {
    # Four tokens in the tiny vocabulary: short, yet it says where the answer starts.
    "answer": PromptTemplate("{input}\n\nAnswer: {output}"),
    # The default of NeMo's GPT fine-tuning configuration, for models tuned with it.
    "nemo": PromptTemplate("{input} {output}"),
}


def template(name: str) -> PromptTemplate:
    """The prompt template of that name. Raises ModelError if there is none."""
    if name not in TEMPLATES:
        raise ModelError(f"prompt_template: {name!r} is not one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]
