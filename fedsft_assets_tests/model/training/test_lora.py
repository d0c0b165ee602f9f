"""Adapters on a GPT-2 (whose layers are Conv1D) and on a Llama (nn.Linear): what is trained, travels and is saved."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.training.local_training import mean_loss, train_round
from fedsft_assets.model.training.lora import add_adapters
from fedsft_assets.specs.job import PeftSpec, TrainingSpec
from fedsft_assets.specs.model_preset import PRESETS

PEFT = PeftSpec(rank=4, alpha=8)
TRAINING = PRESETS["tiny"].resolve(TrainingSpec())


@pytest.fixture(params=["gpt2", "llama"])
def archive(request, base, tmp_path) -> Path:
    """An archive of the layout, as a job starts from one."""
    if request.param == "gpt2":
        return base[0]
    tokenizer = LanguageModel.load(base[0]).tokenizer
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LanguageModel.wrap(LlamaForCausalLM(config), tokenizer, max_length=256).save(tmp_path / "llama.nemo")
    return tmp_path / "llama.nemo"


@pytest.fixture
def model(archive: Path) -> LanguageModel:
    return LanguageModel.load(archive)


@pytest.fixture
def trained(model, tokens, make_plan):
    """The model with adapters that a round has changed, and the adapters."""
    adapters = add_adapters(model, PEFT, seed=1)
    train_round(model, tokens, make_plan(learning_rate=1e-2, local_epochs=2), 0)
    return model, adapters


def logits(lm, tokens) -> torch.Tensor:
    lm.eval()
    with torch.no_grad():
        return torch.cat([lm(input_ids=torch.tensor([one.ids])).logits[0] for one in tokens[:5]])


def whole_weights(model: LanguageModel) -> dict[str, torch.Tensor]:
    """Of everything that is not an adapter, under the names of the archive."""
    return {
        name.replace(".base_layer.", "."): tensor.clone()
        for name, tensor in model.state_dict().items()
        if ".lora_" not in name
    }


def test_new_adapters_change_no_result(model, tokens):
    before, loss = logits(model.lm, tokens), mean_loss(model, tokens, TRAINING)
    add_adapters(model, PEFT, seed=1)
    assert torch.equal(logits(model.lm, tokens), before)
    assert mean_loss(model, tokens, TRAINING).loss == pytest.approx(loss.loss, abs=1e-7)


def test_a_round_changes_all_adapters_and_nothing_else(model, tokens, make_plan):
    before = whole_weights(model)
    add_adapters(model, PEFT, seed=1)
    adapters = model.weights()
    loss = mean_loss(model, tokens, TRAINING).loss
    train_round(model, tokens, make_plan(learning_rate=1e-2, local_epochs=4), 0)
    assert mean_loss(model, tokens, TRAINING).loss < 0.95 * loss
    after = whole_weights(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not any(torch.equal(tensor, adapters[name]) for name, tensor in model.weights().items())


def test_only_adapters_have_gradients_and_travel(model, tokens):
    layers = {name for name, module in model.lm.named_modules() if type(module).__name__ in ("Conv1D", "Linear")}
    layers.remove("lm_head")
    add_adapters(model, PEFT, seed=1)
    with model.answer_loss.prepared():
        model.answer_loss(model.answer_loss.batch(tokens[:4])).backward()
    with_gradients = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradients == {name for name, _ in model.named_parameters() if ".lora_" in name}
    weights = model.weights()
    assert set(weights) == {f"lm.{layer}.lora_{factor}.weight" for layer in layers for factor in "AB"}
    assert {min(tensor.shape) for tensor in weights.values()} == {PEFT.rank}
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_adapters_travel_from_one_site_to_another(trained, archive, tokens):
    model, _ = trained
    other = LanguageModel.load(archive)
    add_adapters(other, PEFT, seed=99)
    other.load_weights(model.weights())
    assert torch.equal(logits(other.lm, tokens), logits(model.lm, tokens))
    with pytest.raises(ModelError, match="not the weights of this model: missing"):
        other.load_weights(LanguageModel.load(archive).weights())


def test_first_adapters_follow_from_the_seed_alone(archive):
    def first(seed: int, noise: int) -> tuple[str, dict[str, torch.Tensor], torch.Tensor]:
        model = LanguageModel.load(archive)
        torch.manual_seed(noise)
        digest = add_adapters(model, PEFT, seed).digest()
        return digest, model.weights(), torch.rand(1)

    digest, weights, drawn = first(seed=1, noise=5)
    again, same, _ = first(seed=1, noise=6)
    other, different, _ = first(seed=2, noise=5)
    assert digest == again != other
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)  # whoever draws next is not disturbed
    for name, tensor in weights.items():
        assert torch.equal(same[name], tensor)
        if ".lora_B." in name:
            assert not tensor.any()
            continue
        assert not torch.equal(different[name], tensor)
        bound = tensor.shape[1] ** -0.5  # peft's own: kaiming_uniform_ with a = sqrt(5)
        assert 0.9 * bound < tensor.abs().max() <= bound
        assert tensor.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_merged_model_is_an_archive_like_the_base_with_the_same_logits(trained, archive, tokens, tmp_path):
    model, adapters = trained
    expected = logits(model.lm, tokens)
    assert not torch.allclose(expected, logits(LanguageModel.load(archive).lm, tokens), atol=1e-2)
    with pytest.raises(ModelError, match="merge the model's adapters"):
        model.save(tmp_path / "merged.nemo")
    adapters.merge()
    model.save(tmp_path / "merged.nemo")
    merged, base = LanguageModel.load(tmp_path / "merged.nemo"), LanguageModel.load(archive)
    assert (merged.hf, merged.max_length, merged.tokenizer_files) == (base.hf, base.max_length, base.tokenizer_files)
    assert merged.weights().keys() == base.weights().keys() == model.weights().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert (logits(merged.lm, tokens) - expected).abs().max() < 1e-5
    assert torch.equal(logits(model.lm, tokens), logits(merged.lm, tokens))


def test_adapter_folder_loads_with_peft_onto_the_base_model(trained, archive, tokens, tmp_path):
    model, adapters = trained
    adapters.save(tmp_path / "adapter")
    expected = logits(model.lm, tokens)
    LanguageModel.load(archive).lm.save_pretrained(tmp_path / "exported")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    loaded = PeftModel.from_pretrained(exported, tmp_path / "adapter")
    assert (logits(loaded, tokens) - expected).abs().max() < 1e-5
    adapters.merge()
    assert (logits(loaded, tokens) - logits(model.lm, tokens)).abs().max() < 1e-5
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 8, "LORA")
    assert config["target_modules"] == sorted(config["target_modules"])


def test_batches_stay_without_padding_and_the_head_on_its_short_way(model, tokens):
    before = model.answer_loss
    add_adapters(model, PEFT, seed=1)
    assert model.answer_loss is not before
    assert (model.answer_loss.packs, model.answer_loss.plain_head) == (before.packs, before.plain_head) == (True, True)
    assert model.answer_loss.batch(tokens[:3]).input_ids.shape == (1, sum(len(one) - 1 for one in tokens[:3]))


def test_trained_model_has_the_same_loss_packed_and_record_by_record(trained, tokens):
    model, _ = trained
    assert model.answer_loss.packs
    with model.answer_loss.prepared(), torch.no_grad():
        packed = model.answer_loss(model.answer_loss.batch(tokens[:5])).item()
    alone = 0.0
    for one, scores in zip(tokens, logits(model.lm, tokens).split([len(one) for one in tokens[:5]]), strict=False):
        chosen = scores.log_softmax(-1)[one.prompt - 1 : len(one) - 1]
        alone -= chosen.gather(1, torch.tensor(one.ids[one.prompt :])[:, None]).sum().item()
    assert packed == pytest.approx(alone, rel=1e-5)


def test_model_with_adapters_generates_as_the_merged_one(trained):
    model, adapters = trained
    answers = model.generate(["what is the colour of snow?", "Say gold"])
    adapters.merge()
    assert model.generate(["what is the colour of snow?", "Say gold"]) == answers


def test_checkpointed_activations_and_dropout_train_the_same_adapters_again(archive, tokens, make_plan):
    def after_a_round(**changes: object) -> dict[str, torch.Tensor]:
        model = LanguageModel.load(archive)
        add_adapters(model, PeftSpec(rank=2, dropout=0.3), seed=1)
        train_round(model, tokens, make_plan(**changes), 0)
        return model.weights()

    plain, again = after_a_round(), after_a_round()
    assert all(torch.equal(again[name], tensor) for name, tensor in plain.items())
    for name, tensor in after_a_round(activation_checkpointing=True).items():
        torch.testing.assert_close(tensor, plain[name], atol=1e-4, rtol=1e-3)


def test_target_modules_are_chosen_by_name(model):
    layer = "c_fc" if model.hf["model_type"] == "gpt2" else "up_proj"
    add_adapters(model, PeftSpec(rank=2, target_modules=[layer]), seed=1)
    assert {name.rsplit(".", 3)[1] for name in model.weights()} == {layer}
    assert len(model.weights()) == 2 * 2


@pytest.mark.parametrize("name", ["wte", "lm_head", "q", "mlp"])
def test_name_of_no_linear_layer_is_an_error_that_says_what_there_is(base, name):
    model = LanguageModel.load(base[0])
    with pytest.raises(
        ModelError, match=rf"training\.peft\.target_modules: {name}: .*GPT2LMHeadModel.*c_attn, c_fc, c_proj"
    ):
        add_adapters(model, PeftSpec(target_modules=["c_fc", name]), seed=1)


def test_adapters_on_adapters_are_an_error(model):
    add_adapters(model, PEFT, seed=1)
    with pytest.raises(ModelError, match="has adapters already"):
        add_adapters(model, PEFT, seed=1)


def test_adding_and_training_says_nothing(model, tokens, make_plan, capfd, recwarn):
    adapters = add_adapters(model, PEFT, seed=1)
    train_round(model, tokens, make_plan(max_local_steps=1), 0)
    adapters.merge()
    assert capfd.readouterr() == ("", "")
    assert [str(warning.message) for warning in recwarn] == []


@pytest.mark.slow
def test_full_training_does_not_load_peft():
    program = "import sys, fedsft_assets.federation.site.trainer; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
