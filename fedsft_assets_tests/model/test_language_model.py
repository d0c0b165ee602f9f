import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from fedsft_assets.model import language_model
from fedsft_assets.model.archive import torch_writer
from fedsft_assets.model.archive.nemo_archive import content_digest
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.training.answer_loss import AnswerLoss
from fedsft_assets.model.training.batches import Tokens, pad
from fedsft_assets.model.training.local_training import mean_loss
from fedsft_assets.specs.job import TrainingSpec
from fedsft_assets.specs.model_preset import PRESETS

PROJECT = Path(__file__).parents[2]
TRAINING = PRESETS["tiny"].resolve(TrainingSpec())
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def naive_loss(lm, tokens: list[Tokens]) -> float:
    """The definition, record by record and token by token, from the logits of all positions."""
    total = 0.0
    for record in tokens:
        log_probabilities = lm(input_ids=torch.tensor([record.ids])).logits[0].log_softmax(-1)
        total -= sum(
            log_probabilities[position - 1, record.ids[position]].item()
            for position in range(record.prompt, len(record))
        )
    return total


def summed(loss: AnswerLoss, tokens: list[Tokens]) -> torch.Tensor:
    with loss.prepared():
        return loss(loss.batch(tokens))


def hugging_faces_own(lm, tokens: list[Tokens]) -> torch.Tensor:
    """The mean loss of a padded batch with labels."""
    batch = pad([Tokens([*one.ids, 0], one.prompt) for one in tokens], pad_id=0)
    labels = torch.full_like(batch.input_ids, -100)
    for row, one in enumerate(tokens):
        labels[row, one.prompt : len(one)] = torch.tensor(one.ids[one.prompt :])
    return lm(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels).loss


def test_loss_equals_hugging_faces_own_and_a_naive_loop(model, tokens):
    some = tokens[3:9]
    count = sum(one.targets() for one in some)
    assert model.answer_loss.packs
    assert model.answer_loss.plain_head
    loss = summed(model.answer_loss, some).item()
    assert loss == pytest.approx(hugging_faces_own(model.lm, some).item() * count, rel=1e-5)
    assert loss == pytest.approx(naive_loss(model.lm, some), rel=1e-5)


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("plain_head", [True, False])
def test_gradient_equals_that_of_hugging_faces_loss_in_every_way_through_the_model(model, tokens, packs, plain_head):
    some = tokens[3:9]
    model.answer_loss.packs, model.answer_loss.plain_head = packs, plain_head
    (summed(model.answer_loss, some) / sum(one.targets() for one in some)).backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    hugging_faces_own(model.lm, some).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_a_record_in_a_row_sees_nothing_of_the_others(model, tokens):
    alone = [summed(model.answer_loss, [one]).item() for one in tokens[:3]]
    assert summed(model.answer_loss, tokens[:3]).item() == pytest.approx(sum(alone), rel=1e-6)
    others = [Tokens([5] * 30, prompt=29), tokens[1], Tokens([6] * 40, prompt=39)]
    together = summed(model.answer_loss, others).item()
    without = summed(model.answer_loss, [others[0]]).item() + summed(model.answer_loss, [others[2]]).item()
    assert together - without == pytest.approx(alone[1], rel=1e-5)


@pytest.mark.parametrize(
    ("lm", "packs", "plain_head"),
    [
        (
            lambda: GPT2LMHeadModel(GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=2, n_positions=64)),
            True,
            True,
        ),
        (lambda: LlamaForCausalLM(LlamaConfig(vocab_size=99, num_key_value_heads=1, **SMALL)), True, True),
        (
            lambda: MistralForCausalLM(MistralConfig(vocab_size=99, num_key_value_heads=1, sliding_window=4, **SMALL)),
            True,
            True,
        ),
        (
            lambda: Gemma2ForCausalLM(Gemma2Config(vocab_size=99, num_key_value_heads=1, head_dim=16, **SMALL)),
            False,
            False,
        ),
    ],
    ids=["gpt2", "llama-grouped-queries", "mistral-sliding-window", "gemma2-soft-caps"],
)
def test_each_architecture_goes_the_fastest_way_that_gives_its_own_loss(lm, packs, plain_head):
    torch.manual_seed(0)
    lm = lm().eval()
    loss = AnswerLoss(lm, pad_id=0)
    assert (loss.packs, loss.plain_head) == (packs, plain_head)
    tokens = [Tokens([(7 * k + n) % 99 for k in range(n)], prompt=n // 2) for n in (20, 3, 11)]
    assert summed(loss, tokens).item() == pytest.approx(naive_loss(lm, tokens), rel=1e-4)


def test_gpt2s_own_activation_is_computed_by_the_faster_kernel_and_the_configuration_says_what_it_said():
    hf = {**GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=1).to_dict(), "activation_function": "gelu_new"}
    model = LanguageModel({"hf": hf, "max_length": 8, "prompt_template": "answer"}, {})
    assert model.lm.config.activation_function == "gelu_pytorch_tanh"
    assert model.hf["activation_function"] == "gelu_new"
    values = torch.linspace(-5, 5, 100)
    from transformers.activations import ACT2FN

    torch.testing.assert_close(ACT2FN["gelu_new"](values), ACT2FN["gelu_pytorch_tanh"](values), atol=1e-6, rtol=1e-5)


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
    other = LanguageModel.wrap(make(len(model.tokenizer)).eval(), model.tokenizer, max_length=64).eval()
    loss = summed(other.answer_loss, tokens[:5]).item()
    assert loss == pytest.approx(naive_loss(other.lm, tokens[:5]), rel=1e-5)
    other.save(tmp_path / "other.nemo")
    restored = LanguageModel.load(tmp_path / "other.nemo").eval()
    assert summed(restored.answer_loss, tokens[:5]).item() == loss


def test_loss_is_right_when_the_projection_is_not_called_as_a_module(model, tokens, monkeypatch):
    expected = summed(model.answer_loss, tokens[:5]).item()
    monkeypatch.setattr(model.lm, "get_output_embeddings", lambda: None)
    assert summed(AnswerLoss(model.lm, pad_id=0), tokens[:5]).item() == pytest.approx(expected, rel=1e-6)


def test_special_tokens_are_those_of_the_loaded_tokenizer(model):
    assert model.special_tokens == language_model.SpecialTokens(front=[], eos=model.tokenizer.eos_token_id)


def test_an_archive_without_the_tokenizers_fast_form_says_so(model):
    del model.tokenizer_files["tokenizer.json"]
    with pytest.raises(ModelError, match=r"no tokenizer\.json, only tokenizer_config\.json"):
        _ = model.special_tokens


def test_tied_weights_travel_once_under_their_first_name_as_copies(model):
    weights = model.weights()
    assert "lm.transformer.wte.weight" in weights
    assert "lm.lm_head.weight" not in weights
    assert sum(tensor.numel() for tensor in weights.values()) == sum(
        parameter.numel() for parameter in model.parameters()
    )
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
    before = model.weights()
    weights = {name: tensor + 1 for name, tensor in model.weights().items()}
    change(weights)
    with pytest.raises(ModelError, match=message):
        model.load_weights(weights)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.weights().items())


def test_a_new_process_restores_the_same_model_from_the_archive_alone(model, tokens, tmp_path, records):
    saved = tmp_path / "saved.nemo"
    model.load_weights({name: tensor * 1.01 for name, tensor in model.weights().items()})
    model.save(saved)
    script = """
import json, sys, pathlib
from fedsft_assets.model.archive.nemo_archive import content_digest
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.training.batches import tokenize
from fedsft_assets.model.training.local_training import mean_loss
import torch
torch.set_num_threads(1)
from fedsft_assets.specs.job import TrainingSpec
from fedsft_assets.specs.model_preset import PRESETS
path = pathlib.Path("saved.nemo")
model = LanguageModel.load(path)
tokens = tokenize(json.loads(sys.argv[1]), model.tokenizer, model.max_length)
training = PRESETS["tiny"].resolve(TrainingSpec())
print(json.dumps([mean_loss(model, tokens, training).loss, content_digest(path), "nemo" in sys.modules]))
"""
    result = subprocess.run(
        [sys.executable, "-c", script, json.dumps(records)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    loss, digest, nemo = json.loads(result.stdout.splitlines()[-1])
    assert loss == pytest.approx(mean_loss(model, tokens, TRAINING).loss, abs=1e-7)
    assert digest == content_digest(saved)
    assert not nemo


def test_a_restored_model_saves_again_even_over_and_without_its_archive(model, tmp_path):
    first, second = tmp_path / "first.nemo", tmp_path / "second.nemo"
    model.save(first)
    digest = content_digest(first)
    restored = LanguageModel.load(first)
    restored.save(first)
    first.unlink()
    restored.save(second)
    assert content_digest(second) == digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["second.nemo"]


def test_a_failed_save_leaves_the_old_archive(model, tmp_path, monkeypatch):
    path = tmp_path / "model.nemo"
    path.write_bytes(b"old")
    monkeypatch.setattr(torch_writer, "write_tensors", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        model.save(path)
    assert path.read_bytes() == b"old"
    assert [found.name for found in tmp_path.iterdir()] == ["model.nemo"]


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(model):
    few = LlamaForCausalLM(LlamaConfig(vocab_size=10, **SMALL))
    with pytest.raises(ModelError, match="embeddings for 10"):
        LanguageModel.wrap(few, model.tokenizer, max_length=64)
    model.tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no EOS token"):
        LanguageModel.wrap(model.lm, model.tokenizer, max_length=64)
