"""The overhead benchmark's base model as NVFlare's server makes it: a class with arguments that are plain values."""

from transformers import AutoConfig, GPT2LMHeadModel


class BaseModel(GPT2LMHeadModel):
    """The model of a Hugging Face folder, with its weights."""

    def __init__(self, folder: str) -> None:
        super().__init__(AutoConfig.from_pretrained(folder))
        self.load_state_dict(GPT2LMHeadModel.from_pretrained(folder).state_dict())
