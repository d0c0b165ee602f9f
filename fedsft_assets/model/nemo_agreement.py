"""Whether an archive is the same model to NeMo as to this package: what NeMo restores must give the same logits."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.text_generation import plain_tokens

PROMPTS = (
    "What is the capital of Norway?",
    "Tell me an interesting fact about space travel.",
    "Grüße: 12 × 34 = 408, naïve café, 東京.\n\n- one\n- two",
)
_TOLERANCE = 1e-5  # of the largest logit


@dataclass(frozen=True)
class Agreement:
    """Logits of all `tokens` of the prompts in fp32: the largest difference, and the largest absolute value."""

    prompts: int
    tokens: int
    difference: float
    largest: float

    @property
    def agrees(self) -> bool:
        return self.difference <= _TOLERANCE * self.largest


def agreement(archive: Path) -> Agreement:
    """Compare what NeMo restores from an archive with `LanguageModel`, on the CPU; one of them in memory at a time.

    NeMo is imported by the first call in a process. Raises ModelError that names the file if either cannot read it, if
    their tokenizers differ, or if a logit is no finite number.
    """
    own_tokens, own_logits = _look(LanguageModel.load(archive))
    _silence_telemetry()
    from fedsft_assets.model.nemo_model import SFTModel

    nemos_tokens, nemos_logits = _look(SFTModel.load(archive).language_model)
    if nemos_tokens != own_tokens:
        raise ModelError(f"{archive}: the tokenizer that NeMo restores makes other tokens of the same text")
    if not all(logits.isfinite().all() for logits in (*own_logits, *nemos_logits)):
        raise ModelError(f"{archive}: its weights give logits that are not finite")
    differences = [(own - nemos).abs().max() for own, nemos in zip(own_logits, nemos_logits, strict=True)]
    return Agreement(
        prompts=len(own_tokens),
        tokens=sum(map(len, own_tokens)),
        difference=torch.stack(differences).max().item(),
        largest=torch.stack([logits.abs().max() for logits in own_logits]).max().item(),
    )


def _silence_telemetry() -> None:
    """NeMo's telemetry is off, and warns of that on import; errors are raised as errors."""
    telemetry = logging.getLogger("nv_one_logger")
    telemetry.addHandler(logging.NullHandler())
    telemetry.propagate = False


def _look(model: LanguageModel) -> tuple[list[list[int]], list[Tensor]]:
    """The tokens of each prompt, cut to the model's window, and their logits [T, V]."""
    tokens = [plain_tokens(model.text_encoder, text, model.prompt_template)[: model.max_length] for text in PROMPTS]
    model.eval()
    with torch.no_grad():
        return tokens, [model.lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in tokens]
