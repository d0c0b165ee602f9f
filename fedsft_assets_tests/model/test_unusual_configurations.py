"""Models whose configuration is not of the usual form: infinite numbers, wrappers around a text model, other names."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from fedsft_assets.model.archive.archive_config import normalize_hf_config
from fedsft_assets.model.archive.nemo_archive import content_digest, read_config
from fedsft_assets.model.base_model import create_base_model
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.generation_settings import GenerationSettings
from fedsft_assets.model.huggingface.export import export_huggingface
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.training.batches import tokenize
from fedsft_assets.specs.model_preset import model_preset
from fedsft_assets_tests.model.small_models import INFINITE, SMALL

VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def save(model, tmp_path):
    """A function that saves a model with random weights as a folder, with the tiny model's tokenizer."""

    def save(config, auto=AutoModelForCausalLM) -> Path:
        torch.manual_seed(0)
        folder = tmp_path / config.model_type
        auto.from_config(config).save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        return folder

    return save


def same_logits(ours, theirs) -> None:
    ids = torch.arange(20)[None]
    torch.testing.assert_close(ours.eval()(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("kind", INFINITE)
def test_infinity_in_a_configuration_goes_into_the_archive_and_out_again(model, save, tmp_path, kind):
    folder = save(AutoConfig.for_model(kind, vocab_size=len(model.tokenizer), **INFINITE[kind]))
    assert '"Infinity"' in (folder / "config.json").read_text()
    report = create_base_model(model_preset(str(folder)), tmp_path / "x.nemo", 1)
    assert (report.layers, report.width) == (2, 32)
    assert read_config(tmp_path / "x.nemo")["hf"]["time_step_limit"] == [0.0, float("inf")]
    ours = LanguageModel.load(tmp_path / "x.nemo")
    same_logits(ours.lm, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    ours.save(tmp_path / "again.nemo")
    assert content_digest(tmp_path / "again.nemo") == report.digest
    export_huggingface(tmp_path / "x.nemo", tmp_path / "exported")
    assert tuple(AutoConfig.from_pretrained(tmp_path / "exported").time_step_limit) == (0.0, float("inf"))


def test_numbers_that_json_does_not_have_are_read_wherever_they_are():
    written = {"a": {"__float__": "-Infinity"}, "b": [1, {"__float__": "NaN"}], "c": {"d": {"__float__": "Infinity"}}}
    assert yaml.safe_dump(normalize_hf_config(written)) == "a: -.inf\nb:\n- 1\n- .nan\nc:\n  d: .inf\n"
    assert normalize_hf_config({"a": {"__float__": "1e400"}}) == {"a": {}}


def test_a_wrapper_around_a_text_model_is_trained_as_it_is(model, save, tmp_path, records):
    text = {**SMALL, "vocab_size": len(model.tokenizer), "head_dim": 16, "max_position_embeddings": 200}
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config={**VISION, "image_size": 28, "patch_size": 14}
    )
    folder = save(config)
    report = create_base_model(model_preset(str(folder)), tmp_path / "x.nemo", 1)
    assert (report.layers, report.width) == (2, 32)
    again = create_base_model(model_preset(str(tmp_path / "x.nemo")), tmp_path / "again.nemo", 1)
    assert (again.layers, again.width, again.digest) == (2, 32, report.digest)
    ours, theirs = LanguageModel.load(tmp_path / "x.nemo"), AutoModelForCausalLM.from_pretrained(folder)
    assert ours.max_length == 200
    same_logits(ours.lm, theirs)
    tokens = tokenize(records, ours.tokenizer, 200)[:6]
    with ours.answer_loss.prepared():
        ours.answer_loss(ours.answer_loss.batch(tokens)).backward()
    for one in tokens:
        labels = torch.tensor([[-100] * one.prompt + one.ids[one.prompt :]])
        (theirs(input_ids=torch.tensor([one.ids]), labels=labels).loss * one.targets()).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    assert expected
    for name, gradient in expected.items():
        torch.testing.assert_close(ours.lm.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-4)


def test_of_a_wrapper_that_transformers_takes_the_text_model_of_the_rest_is_left_out_aloud(
    model, save, tmp_path, caplog
):
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 48}
    text = {**SMALL, **experts, "vocab_size": len(model.tokenizer), "head_dim": 16, "pad_token_id": 0}
    vision = {**VISION, "image_size": 28, "patch_size": 14, "vision_output_dim": 16}
    projector = {"projector_input_dim": 16, "projector_output_dim": 16}
    config = AutoConfig.for_model("llama4", text_config=text, vision_config={**vision, **projector})
    folder = save(config, AutoModelForImageTextToText)
    create_base_model(model_preset(str(folder)), tmp_path / "x.nemo", 1)
    assert caplog.messages[-1].endswith(" vision and audio tensors; Llama4ForCausalLM is the text model")
    ours = LanguageModel.load(tmp_path / "x.nemo")
    same_logits(ours.lm, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def test_mpt_gets_records_and_answers_within_its_window(model, save, tmp_path, records):
    sizes = {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 24}
    folder = save(AutoConfig.for_model("mpt", vocab_size=len(model.tokenizer), **sizes))
    create_base_model(model_preset(str(folder)), tmp_path / "x.nemo", 1)
    ours = LanguageModel.load(tmp_path / "x.nemo")
    assert ours.max_length == 24
    tokens = tokenize(records, ours.tokenizer, ours.max_length)
    assert max(map(len, tokens)) == 24
    with ours.answer_loss.prepared():
        assert ours.answer_loss(ours.answer_loss.batch(tokens)).isfinite()
    assert ours.generate(["Tell me " * 30], GenerationSettings(max_new_tokens=100))


def test_a_configuration_that_is_no_json_is_refused_by_its_file(save, tmp_path):
    folder = save(AutoConfig.for_model("gpt2", vocab_size=2000, n_embd=32, n_layer=1, n_head=2))
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "n_layer": "two"}))
    with pytest.raises(ModelError, match=r"gpt2: config\.json cannot be used: .*n_layer"):
        create_base_model(model_preset(str(folder)), tmp_path / "x.nemo", 1)
