"""Adapters on models of experts and on Mamba: beside what they are put, what that changes, and what becomes of it."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedsft_assets.federation.server.aggregation import TokenWeightedAverage
from fedsft_assets.model.archive.nemo_archive import read_config
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.huggingface.export import export_huggingface
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.training.local_training import train_round
from fedsft_assets.model.training.lora import add_adapters
from fedsft_assets.specs.job import PeftSpec
from fedsft_assets_tests.model.small_models import DENSE, EXPERTS, MAMBA, small_model

PEFT = PeftSpec(rank=2, alpha=8)
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
STACKED = {"experts.gate_up_proj", "experts.down_proj"}


@pytest.fixture
def archive(request, base, tmp_path) -> Path:
    """An archive of the kind that the test names, with the tokens of the tiny model."""
    tokenizer = LanguageModel.load(base[0]).tokenizer
    lm = small_model(request.param, tokenizer)
    LanguageModel.wrap(lm, tokenizer, max_length=64).save(tmp_path / "base.nemo")
    return tmp_path / "base.nemo"


def of_kinds(*kinds: str):
    return pytest.mark.parametrize("archive", kinds, indirect=True)


def logits(lm) -> torch.Tensor:
    with torch.no_grad():
        return lm.eval()(torch.arange(3, 40)[None]).logits


@of_kinds(*EXPERTS, *MAMBA)
def test_every_adapter_is_trained_and_nothing_else(archive, tokens):
    model = LanguageModel.load(archive)
    before = logits(model.lm)
    adapters = add_adapters(model, PEFT, seed=1)
    torch.testing.assert_close(logits(model.lm), before, rtol=0, atol=1e-5)
    weights = model.weights()
    assert all(".lora_A." in name or ".lora_B." in name for name in weights)
    model.load_weights({name: tensor + 0.1 for name, tensor in weights.items()})  # else B, at zero, hides A
    model.train()
    with model.answer_loss.prepared():
        model.answer_loss(model.answer_loss.batch(tokens[:12])).backward()
    parameters = dict(model.named_parameters())
    trained = {name for name, one in parameters.items() if one.grad is not None and one.grad.any()}
    assert trained == {name for name in parameters if ".lora_" in name}
    assert len(trained) == len(weights) == 2 * len(adapters.targets.layers) + 2 * len(adapters.targets.experts)


@of_kinds(*EXPERTS)
def test_experts_have_adapters_and_most_of_the_model_is_beside_one(archive):
    adapters = add_adapters(LanguageModel.load(archive), PEFT, seed=1)
    assert set(adapters.targets.names) >= STACKED
    assert len(adapters.targets.experts) % 2 == 0
    alone = add_adapters(LanguageModel.load(archive), PeftSpec(rank=2, target_modules=["o_proj"]), seed=1)
    assert set(alone.targets.names) == {"o_proj"}
    assert not alone.targets.experts
    assert alone.targets.share < adapters.targets.share / 4


@of_kinds("mixtral")
def test_names_choose_experts_too(archive):
    model = LanguageModel.load(archive)
    targets = add_adapters(model, PeftSpec(rank=2, target_modules=["experts.down_proj", "q_proj"]), seed=1).targets
    assert targets.names == ["experts.down_proj", "q_proj"]
    assert len(model.weights()) == 2 * 2 * 2
    only = LanguageModel.load(archive)
    assert not add_adapters(only, PeftSpec(rank=2, target_modules=["down_proj"]), seed=1).targets.layers
    with pytest.raises(
        ModelError, match=r"target_modules: w1: no linear layer and no experts of MixtralForCausalLM .*"
    ):
        add_adapters(LanguageModel.load(archive), PeftSpec(target_modules=["w1"]), seed=1)


@of_kinds("mixtral")
def test_what_is_trained_is_said(archive):
    model = LanguageModel.load(archive)
    weights = sum(parameter.numel() for parameter in model.parameters())
    adapters = add_adapters(model, PEFT, seed=1)
    # Of each of 2 layers: attention over 32 with 4 heads of 8, 2 of them for keys; 4 experts of 32 to 2 × 48 and back.
    beside = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 4 * 3 * 32 * 48)
    trained = 2 * 2 * (2 * (32 + 32) + 2 * (32 + 16) + 4 * (32 + 96) + 4 * (48 + 32))
    whole = weights + trained
    assert adapters.description() == (
        f"adapters of rank 2 · {trained:,} of {whole:,} parameters ({trained / whole:.1%}) trained · adapters for"
        f" experts.down_proj, experts.gate_up_proj, k_proj, o_proj, q_proj, v_proj ({beside / weights:.1%} of the"
        " model)"
    )


@of_kinds("mamba", "falcon_mamba")
def test_mamba_has_adapters_where_they_are_trained(archive):
    """Weights of the others go into a kernel, past the layers and what lies beside them."""
    adapters = add_adapters(LanguageModel.load(archive), PEFT, seed=1)
    assert adapters.targets.names == ["in_proj"]
    assert adapters.description().endswith(" · dt_proj, out_proj, x_proj cannot have adapters")
    with pytest.raises(ModelError, match=r"out_proj: no linear layer that can have an adapter .* available: in_proj"):
        add_adapters(LanguageModel.load(archive), PeftSpec(target_modules=["in_proj", "out_proj"]), seed=1)


@of_kinds("deepseek_v3")
def test_layers_that_peft_takes_for_experts_have_no_adapters_of_their_own(archive):
    adapters = add_adapters(LanguageModel.load(archive), PEFT, seed=1)
    assert adapters.description().endswith(" · down_proj, gate_proj, up_proj cannot have adapters")


@of_kinds("phimoe")
def test_layer_that_does_more_than_a_linear_one_has_no_adapter(archive):
    assert add_adapters(LanguageModel.load(archive), PEFT, seed=1).targets.left_out == ("router",)


@of_kinds("mixtral")
def test_dropout_beside_experts_is_refused_with_what_to_do(archive):
    with pytest.raises(ModelError, match=r"training\.peft\.dropout: 0\.1: .* has no dropout for experts, .* set 0"):
        add_adapters(LanguageModel.load(archive), PeftSpec(rank=2, dropout=0.1), seed=1)
    add_adapters(LanguageModel.load(archive), PeftSpec(rank=2, dropout=0.1, target_modules=["q_proj"]), seed=1)


@of_kinds("mixtral", "olmoe", "gpt_oss", "deepseek_v3", "jamba", "mamba")
def test_average_of_two_sites_becomes_a_checkpoint_and_a_folder_for_peft(archive, tokens, make_plan, tmp_path):
    mean = TokenWeightedAverage()
    sent, digests = [], set()
    for site, share in (("site-1", tokens[:6]), ("site-2", tokens[6:14])):
        model = LanguageModel.load(archive)
        digests.add(add_adapters(model, PEFT, seed=1).digest())
        report = train_round(model, share, make_plan(site=site, learning_rate=1e-2, max_local_steps=2), 0)
        sent.append((model.weights(), report.tokens))
        mean.add(site, model.weights(), report.tokens)
    assert len(digests) == 1
    averaged = dict(mean.tensors())
    (one, tokens_of_one), (other, tokens_of_other) = sent
    whole = tokens_of_one + tokens_of_other
    for name, tensor in averaged.items():
        exact = (one[name].double() * tokens_of_one + other[name].double() * tokens_of_other) / whole
        assert torch.equal(tensor, exact.float())
        assert not torch.equal(one[name], other[name])

    # As a checkpoint is made of what the server left.
    model = LanguageModel.load(archive)
    adapters = add_adapters(model, PEFT, seed=1)
    model.load_weights(averaged)
    expected = logits(model.lm)
    adapters.save(tmp_path / "adapter")
    adapters.merge()
    model.save(tmp_path / "merged.nemo")
    merged, base = LanguageModel.load(tmp_path / "merged.nemo"), LanguageModel.load(archive)
    assert {name: one.shape for name, one in merged.weights().items()} == {
        name: one.shape for name, one in base.weights().items()
    }
    difference = (logits(base.lm) - expected).abs().max()
    assert difference > 1e-3
    assert (logits(merged.lm) - expected).abs().max() < 1e-2 * difference

    export_huggingface(archive, tmp_path / "folder")
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "folder", local_files_only=True), tmp_path / "adapter"
    )
    assert (logits(loaded) - expected).abs().max() < 1e-2 * difference
    said = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    for field in ("target_modules", "target_parameters"):
        assert said[field] == (sorted(said[field]) if said[field] else said[field])


@of_kinds("mixtral")
def test_archives_of_equal_merged_models_have_equal_bytes(archive, tokens, make_plan, tmp_path):
    for name in ("one", "other"):
        model = LanguageModel.load(archive)
        adapters = add_adapters(model, PEFT, seed=1)
        train_round(model, tokens[:8], make_plan(learning_rate=1e-2, max_local_steps=2), 0)
        weights = model.weights()
        if name == "other":  # the server's, which has computed nothing with this model
            model = LanguageModel.load(archive)
            adapters = add_adapters(model, PEFT, seed=1)
            model.load_weights(weights)
        adapters.merge()
        model.save(tmp_path / f"{name}.nemo")
    assert (tmp_path / "one.nemo").read_bytes() == (tmp_path / "other.nemo").read_bytes()


@of_kinds(*DENSE, *EXPERTS, *MAMBA)
def test_a_model_without_values_gets_the_same_adapters(archive):
    model = LanguageModel.load(archive)
    with torch.device("meta"):
        empty = LanguageModel(read_config(archive), {})
        said = add_adapters(empty, PEFT, seed=1).description()
    assert said == add_adapters(model, PEFT, seed=1).description()
    found = {name: tensor.shape for name, tensor in empty.distinct_parameters().items()}
    assert found == {name: tensor.shape for name, tensor in model.distinct_parameters().items()}
