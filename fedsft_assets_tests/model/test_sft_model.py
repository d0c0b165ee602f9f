import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from fedsft_assets.model.archive import ModelError
from fedsft_assets.model.batches import IGNORED, collate
from fedsft_assets.model.sft_model import SFTModel
from fedsft_assets.model.training import mean_loss

PROJECT = Path(__file__).parents[2]
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def naive_loss(lm, batch) -> float:
    """The definition, token by token, from the logits of all positions."""
    log_probabilities = lm(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.log_softmax(-1)
    return -sum(
        log_probabilities[row, position - 1, batch.labels[row, position]].item()
        for row in range(batch.labels.shape[0])
        for position in range(1, batch.labels.shape[1])
        if batch.labels[row, position] != IGNORED
    )


def test_answer_loss_equals_hugging_faces_own_and_a_naive_loop(model, tokens):
    batch = collate(tokens[3:9], pad=0)
    loss, count = model.answer_loss(batch)
    reference = model.lm(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels
    ).loss.item()
    assert count == sum(one.answer for one in tokens[3:9])
    assert loss.item() == pytest.approx(reference * count, rel=1e-5)
    assert loss.item() == pytest.approx(naive_loss(model.lm, batch), rel=1e-5)
    assert model.training_step(batch).item() == pytest.approx(reference, rel=1e-5)


def test_gradient_equals_that_of_hugging_faces_loss(model, tokens):
    batch = collate(tokens[3:9], pad=0)
    model.training_step(batch).backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.lm(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda vocabulary: LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=False, **SMALL)),
        lambda vocabulary: Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=vocabulary, head_dim=16, num_key_value_heads=1, final_logit_softcapping=0.05, **SMALL
            )
        ),
    ],
    ids=["llama-untied", "gemma2-soft-capped"],
)
def test_other_architectures_have_the_right_loss_and_survive_the_archive(model, tokens, tmp_path, make):
    torch.manual_seed(0)
    other = SFTModel.wrap(make(len(model.tokenizer)).eval(), model.tokenizer, max_length=64).eval()
    batch = collate(tokens[:5], pad=0)
    assert other.answer_loss(batch)[0].item() == pytest.approx(naive_loss(other.lm, batch), rel=1e-5)
    other.save(tmp_path / "other.nemo")
    restored = SFTModel.load(tmp_path / "other.nemo").eval()
    assert restored.answer_loss(batch)[0].item() == other.answer_loss(batch)[0].item()


def test_loss_is_right_when_the_projection_is_not_called_as_a_module(model, tokens, monkeypatch):
    batch = collate(tokens[:5], pad=0)
    expected = model.answer_loss(batch)[0].item()
    monkeypatch.setattr(model.lm, "get_output_embeddings", lambda: None)
    assert model.answer_loss(batch)[0].item() == pytest.approx(expected, rel=1e-6)


def test_tied_weights_travel_once_under_their_first_name_as_copies(model):
    weights = model.weights()
    assert "lm.transformer.wte.weight" in weights
    assert "lm.lm_head.weight" not in weights
    assert sum(tensor.numel() for tensor in weights.values()) == model.num_weights
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    for tensor in weights.values():
        tensor.zero_()
    assert model.lm.transformer.wte.weight.abs().sum() > 0


def test_load_weights_takes_what_weights_gives_in_any_float_type_and_keeps_ties(model):
    changed = {name: (tensor + 1).bfloat16() for name, tensor in model.weights().items()}
    model.load_weights(changed)
    assert model.lm.lm_head.weight is model.lm.transformer.wte.weight
    for name, tensor in model.weights().items():
        torch.testing.assert_close(tensor, changed[name].float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("lm.transformer.ln_f.bias"), "missing lm.transformer.ln_f.bias"),
        (lambda w: w.update({"lm.extra": torch.zeros(1)}), "unexpected lm.extra"),
        (
            lambda w: w.update({"lm.transformer.ln_f.bias": torch.zeros(3)}),
            r"lm.transformer.ln_f.bias has shape \(3,\), expected \(192,\)",
        ),
    ],
)
def test_load_weights_names_the_tensor_that_does_not_fit_and_changes_nothing(model, change, message):
    before = model.content_digest()
    weights = {name: tensor + 1 for name, tensor in model.weights().items()}
    change(weights)
    with pytest.raises(ModelError, match=message):
        model.load_weights(weights)
    assert model.content_digest() == before


def test_a_new_process_restores_the_same_model_from_the_archive_alone(model, tokens, tmp_path, records):
    saved = tmp_path / "saved.nemo"
    model.load_weights({name: tensor * 1.01 for name, tensor in model.weights().items()})
    model.save(saved)
    script = """
import json, sys, pathlib
from fedsft_assets.model.sft_model import SFTModel
from fedsft_assets.model.batches import tokenize
from fedsft_assets.model.training import mean_loss
import torch
torch.set_num_threads(1)
model = SFTModel.load(pathlib.Path("saved.nemo"))
tokens = tokenize(json.loads(sys.argv[1]), model.tokenizer, model.max_length)
print(json.dumps([mean_loss(model, tokens, 4).loss, model.content_digest()]))
"""
    result = subprocess.run(
        [sys.executable, "-c", script, json.dumps(records)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    loss, digest = json.loads(result.stdout.splitlines()[-1])
    assert loss == pytest.approx(mean_loss(model, tokens, 4).loss, abs=1e-7)
    assert digest == model.content_digest()


def test_a_restored_model_saves_again_even_over_and_without_its_archive(model, tmp_path):
    first, second = tmp_path / "first.nemo", tmp_path / "second.nemo"
    model.save(first)
    restored = SFTModel.load(first)
    restored.save(first)
    first.unlink()
    restored.save(second)
    assert SFTModel.load(second).content_digest() == model.content_digest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["second.nemo"]


def test_a_failed_save_leaves_the_old_archive(model, tmp_path, monkeypatch):
    path = tmp_path / "model.nemo"
    path.write_bytes(b"old")
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        model.save(path)
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["model.nemo"]


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(model):
    few = LlamaForCausalLM(LlamaConfig(vocab_size=10, **SMALL))
    with pytest.raises(ModelError, match="embeddings for 10"):
        SFTModel.wrap(few, model.tokenizer, max_length=64)
    model.tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS token"):
        SFTModel.wrap(model.lm, model.tokenizer, max_length=64)
