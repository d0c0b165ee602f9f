"""Tokenizers of Hugging Face folders: read as transformers reads them, with all that ends an answer, or refused."""

import importlib
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, LlamaConfig, LlamaForCausalLM, XGLMConfig

from fedsft_assets.model.archive.nemo_archive import read_config
from fedsft_assets.model.base_model import create_base_model
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.generation_settings import GenerationSettings, end_tokens
from fedsft_assets.model.huggingface.export import export_huggingface
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.preset_tokenizer import preset_tokenizer
from fedsft_assets.model.tokenizer.encode import TextEncoder
from fedsft_assets.model.tokenizer.tiny import sample_texts
from fedsft_assets.specs.model_preset import PRESETS, model_preset
from fedsft_assets_tests.model.hf_tokenizers import hf_tokenizer


def _save_model(folder: Path, vocabulary: int, eos: int) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{"vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "max_position_embeddings": 64, "eos_token_id": eos, "initializer_range": 0.5},
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama of random weights with GLM's kind of tokenizer, which has two tokens before every text."""
    tokenizer = hf_tokenizer("as GLM's")
    _save_model(tmp_path / "mine", len(tokenizer) + 3, tokenizer.eos_token_id)
    tokenizer.save_pretrained(tmp_path / "mine")
    return tmp_path / "mine"


def _say_ends(folder: Path, ends: list[int]) -> None:
    GenerationConfig(eos_token_id=ends).save_pretrained(folder)


def test_every_end_that_the_settings_for_generation_say_ends_an_answer(folder: Path, tmp_path: Path) -> None:
    create_base_model(model_preset(str(folder)), tmp_path / "one.nemo", 1)
    one = LanguageModel.load(tmp_path / "one.nemo")
    prompt = one.text_encoder.front + one.text_encoder.prompts(["What is it?\n\nAnswer:"])[0]
    made = one.lm.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0, len(prompt) :]
    third = int(made[2])
    assert third not in made[:2]
    _say_ends(folder, [one.special_tokens.eos, third])

    create_base_model(model_preset(str(folder)), tmp_path / "both.nemo", 1)
    both = LanguageModel.load(tmp_path / "both.nemo")
    settings = GenerationSettings(max_new_tokens=12)
    assert both.generate(["What is it?"], settings) == [
        both.tokenizer.decode(made[:2], skip_special_tokens=True).strip()
    ]
    assert one.generate(["What is it?"], settings) != both.generate(["What is it?"], settings)
    export_huggingface(tmp_path / "both.nemo", tmp_path / "exported")
    assert GenerationConfig.from_pretrained(tmp_path / "exported").eos_token_id == [one.special_tokens.eos, third]


def test_one_end_stays_as_the_configuration_says_it(folder: Path, tmp_path: Path) -> None:
    _say_ends(folder, [0])
    create_base_model(model_preset(str(folder)), tmp_path / "one.nemo", 1)
    assert read_config(tmp_path / "one.nemo")["hf"]["eos_token_id"] == 0
    export_huggingface(tmp_path / "one.nemo", tmp_path / "exported")
    assert GenerationConfig.from_pretrained(tmp_path / "exported").eos_token_id == 0


def test_ends_are_one_or_several_each_once() -> None:
    assert end_tokens(None, 3, [5, 3], (), 0) == [3, 5, 0]


def test_what_ends_an_answer_comes_from_no_text(folder: Path, tmp_path: Path) -> None:
    tokenizer = hf_tokenizer("as GLM's")
    tokenizer.add_tokens([AddedToken("<|turn|>", special=False)])
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    tokenizer.save_pretrained(folder)
    assert turn in TextEncoder.of(tokenizer).prompts(["a <|turn|> b"])[0]
    _say_ends(folder, [tokenizer.eos_token_id, turn])
    create_base_model(model_preset(str(folder)), tmp_path / "base.nemo", 1)
    made = LanguageModel.load(tmp_path / "base.nemo").text_encoder.prompts(["a <|turn|> b"])
    assert turn not in made[0]
    measured = preset_tokenizer(model_preset(str(folder)), tmp_path / "cache")
    assert TextEncoder(measured.to_str().encode()).prompts(["a <|turn|> b"]) == made


def test_settings_for_generation_that_are_not_json_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"mine/generation_config\.json: is not JSON: .*; download it again"):
        create_base_model(model_preset(str(folder)), tmp_path / "base.nemo", 1)


@pytest.mark.parametrize("name", ["tiny", "smollm2-135m", "gpt-1.3b"])
def test_a_folder_with_the_name_of_a_preset_is_that_folder(folder: Path, tmp_path: Path, name: str) -> None:
    place = folder.rename(tmp_path / name)
    preset = model_preset(str(place))
    own = AutoTokenizer.from_pretrained(place)
    for _ in range(2):  # made, and then kept
        assert preset_tokenizer(preset, tmp_path / "cache").get_vocab() == own.get_vocab()
    create_base_model(preset, tmp_path / "base.nemo", 1)
    assert LanguageModel.load(tmp_path / "base.nemo").tokenizer.get_vocab() == own.get_vocab()


def test_the_bare_name_of_a_preset_is_the_preset_beside_such_a_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.rename(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert model_preset("tiny") is PRESETS["tiny"]
    assert model_preset("./tiny").folder == tmp_path / "tiny"
    assert preset_tokenizer(model_preset("tiny"), tmp_path).token_to_id("[gMASK]") is None
    assert preset_tokenizer(model_preset("./tiny"), tmp_path / "cache").token_to_id("[gMASK]") is not None


def test_a_tokenizer_that_changed_in_its_folder_is_read_again(folder: Path, tmp_path: Path) -> None:
    preset = model_preset(str(folder))
    before = preset_tokenizer(preset, tmp_path / "cache")
    hf_tokenizer("Unigram").save_pretrained(folder)
    assert preset_tokenizer(preset, tmp_path / "cache").get_vocab() != before.get_vocab()


def _sentencepiece_works() -> bool:
    """Whether the package is there, of a version that protobuf's goes with (see requirements.txt)."""
    try:
        importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    except Exception:  # of protobuf
        return False
    return True


_NEEDS_SENTENCEPIECE = pytest.mark.skipif(
    not _sentencepiece_works(), reason="the installed sentencepiece does not go with the installed protobuf"
)


@pytest.fixture
def sentencepiece_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder with a model of random weights and a SentencePiece file of that name as its only tokenizer."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer

    def make(name: str = "tokenizer.model", config: Any = None, model_type: str = "bpe") -> Path:
        written = io.BytesIO()
        lines = (line for text in sample_texts() for line in text.splitlines() if line.strip())
        trainer.train(
            **{"sentence_iterator": lines, "model_writer": written, "model_type": model_type, "vocab_size": 500},
            **{"byte_fallback": True, "num_threads": 1, "minloglevel": 2},
        )
        _save_model(tmp_path / "sp", 520, 2)
        if config:
            config.save_pretrained(tmp_path / "sp")
        (tmp_path / "sp" / name).write_bytes(written.getvalue())
        return tmp_path / "sp"

    return make


@_NEEDS_SENTENCEPIECE
@pytest.mark.parametrize(("model_type", "kind"), [("bpe", "LlamaTokenizer"), ("bpe", None), ("unigram", None)])
def test_a_sentencepiece_file_alone_is_a_tokenizer(
    sentencepiece_folder: Callable[..., Path], tmp_path: Path, model_type: str, kind: str | None
) -> None:
    folder = sentencepiece_folder(model_type=model_type)
    if kind:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    create_base_model(model_preset(str(folder)), tmp_path / "base.nemo", 1)
    model = LanguageModel.load(tmp_path / "base.nemo")
    own = AutoTokenizer.from_pretrained(folder)
    for text in ("What is it?", "The answer: Paris, Grüße 世界"):
        alone = own(text, add_special_tokens=False)["input_ids"]
        assert model.text_encoder.prompts([text]) == [alone]
        whole = own(f"{text} {text}", add_special_tokens=False)["input_ids"]
        assert list(model.text_encoder.records([text], [f" {text}"])) == [(whole, len(alone))]
        assert own.convert_ids_to_tokens(whole)[len(alone)].startswith("▁")
    assert model.special_tokens.eos not in model.text_encoder.prompts(["a </s> b"])[0]
    assert preset_tokenizer(model_preset(str(folder)), tmp_path / "cache").get_vocab() == model.tokenizer.get_vocab()


@_NEEDS_SENTENCEPIECE
@pytest.mark.parametrize(
    ("config", "name", "kind"),
    [
        (XGLMConfig(), "sentencepiece.bpe.model", "XGLMTokenizer"),
        (GPT2Config(), "tokenizer.model", "GPT2Tokenizer"),
    ],
)
def test_a_sentencepiece_file_that_transformers_reads_as_another_tokenizer_is_refused(
    sentencepiece_folder: Callable[..., Path], tmp_path: Path, config: Any, name: str, kind: str
) -> None:
    folder = sentencepiece_folder(name, config)
    with pytest.raises(ModelError, match=rf"{name}: transformers encodes .*, with a {kind} of .* but the file itself"):
        preset_tokenizer(model_preset(str(folder)), tmp_path / "cache")


@_NEEDS_SENTENCEPIECE
def test_a_tokenizer_without_a_fast_form_is_refused(sentencepiece_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = sentencepiece_folder("spiece.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPTSw3Tokenizer"}))
    with pytest.raises(
        ModelError, match=r"sp: its tokenizer, a GPTSw3Tokenizer, is not a fast tokenizer.*tokenizer\.json"
    ):
        create_base_model(model_preset(str(folder)), tmp_path / "base.nemo", 1)
    with pytest.raises(ModelError, match="GPTSw3Tokenizer: is not a fast tokenizer"):
        LanguageModel.wrap(LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), 64)


def test_a_sentencepiece_file_without_the_package_that_reads_it_says_which(
    sentencepiece_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sentencepiece_folder()
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(
        ModelError, match=r"sp/tokenizer\.model: the package sentencepiece, needed to read it, is missing .*pip install"
    ):
        create_base_model(model_preset(str(folder)), tmp_path / "base.nemo", 1)


def test_a_sentencepiece_that_does_not_go_with_protobuf_says_so(
    sentencepiece_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sentencepiece_folder()
    monkeypatch.delattr("sentencepiece.sentencepiece_model_pb2", raising=False)
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    with pytest.raises(
        ModelError,
        match=r"tokenizer\.model: the package sentencepiece [\d.]+ does not work with protobuf [\d.]+ .*pip",
    ):
        create_base_model(model_preset(str(folder)), tmp_path / "base.nemo", 1)
