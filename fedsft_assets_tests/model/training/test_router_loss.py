"""A mixture's router is trained as transformers trains it where the configuration asks for that; no loss shows it."""

import pytest
import torch

from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.training.batches import Tokens, pad
from fedsft_assets.model.training.local_training import mean_loss, train_round
from fedsft_assets.model.training.lora import add_adapters
from fedsft_assets.specs.job import PeftSpec, TrainingSpec
from fedsft_assets.specs.model_preset import PRESETS
from fedsft_assets_tests.model.small_models import EXPERTS, small_model

TRAINING = PRESETS["tiny"].resolve(TrainingSpec())
ROUTED = [kind for kind in EXPERTS if kind != "deepseek_v3"]  # which balances its experts without a loss


def mixture(base, kind: str, **changes: object) -> LanguageModel:
    tokenizer = LanguageModel.load(base[0]).tokenizer
    said = {"output_router_logits": True, "router_aux_loss_coef": 0.5} | changes
    return LanguageModel.wrap(small_model(kind, tokenizer, **said), tokenizer, max_length=64)


def gradients(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: one.grad.clone() for name, one in model.lm.named_parameters() if one.grad is not None}


def gradients_of_transformers(model: LanguageModel, records: list[Tokens]) -> dict[str, torch.Tensor]:
    """Of its own loss with labels, on the same padded rows."""
    batch = pad(records, model.special_tokens.eos)
    labels = torch.full((batch.input_ids.numel(),), -100).index_copy(0, batch.positions, batch.targets)
    labels = labels.view_as(batch.input_ids)
    model.lm(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=labels,
        shift_labels=labels,  # each target is at the position that predicts it
        use_cache=False,
    ).loss.backward()
    found = gradients(model)
    model.zero_grad()
    return found


def our_gradients(model: LanguageModel, records: list[Tokens]) -> dict[str, torch.Tensor]:
    loss = model.answer_loss
    with loss.prepared():
        batch = loss.batch(records)
        (loss(batch) / len(batch.targets)).backward()
    return gradients(model)


def off(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest difference of a gradient, as a part of the largest of all."""
    assert ours.keys() == theirs.keys()
    largest = max(tensor.abs().max().item() for tensor in theirs.values())
    return max((ours[name] - tensor).abs().max().item() for name, tensor in theirs.items()) / largest


@pytest.mark.parametrize("kind", ROUTED)
def test_gradients_are_those_of_transformers_with_labels(base, tokens, kind):
    model = mixture(base, kind).train()
    model.answer_loss.packs = False
    torch.manual_seed(1)  # PhiMoE routes at random in training
    theirs = gradients_of_transformers(model, tokens[:6])
    torch.manual_seed(1)
    assert off(our_gradients(model, tokens[:6]), theirs) < 1e-4
    model.answer_loss.router = 0.0
    model.zero_grad()
    torch.manual_seed(1)
    assert off(our_gradients(model, tokens[:6]), theirs) > 1e-2


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "olmoe"])
def test_packed_and_padded_rows_have_the_gradient_of_the_models_own_router_loss(base, tokens, kind):
    model, records = mixture(base, kind).train(), tokens[:6]
    answers = model.answer_loss
    for packs in {answers.packs, False}:
        answers.packs = packs
        model.zero_grad()
        found = our_gradients(model, records)
        model.zero_grad()
        batch = answers.batch(records)
        # The records alone, without what pads them: that is what is routed.
        rows = [torch.tensor([one.ids[:-1]]) for one in records]
        outputs = [model.lm(input_ids=row, use_cache=False) for row in rows]
        scores = torch.cat([one.logits[0] for one in outputs])
        wanted = torch.cat([torch.tensor(one.ids[1:]) for one in records])
        asked = torch.cat([torch.arange(1, len(one)) >= one.prompt for one in records])
        loss = torch.nn.functional.cross_entropy(scores[asked], wanted[asked])
        assert len(batch.targets) == int(asked.sum())
        gates = tuple(torch.cat(layer) for layer in zip(*(one.router_logits for one in outputs), strict=True))
        (loss + 0.5 * load_balance(gates, experts=4, chosen=2)).backward()
        assert off(found, gradients(model)) < 1e-4


def load_balance(gates: tuple[torch.Tensor, ...], experts: int, chosen: int) -> torch.Tensor:
    """Equations (4) to (6) of arXiv 2101.03961, over the tokens of all layers: `gates` are [tokens, experts] each."""
    probabilities = torch.cat(gates).softmax(-1)
    used = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(chosen).indices, 1.0)
    return experts * (used.mean(0) * probabilities.mean(0)).sum()


def test_shown_losses_never_count_the_routers(base, tokens, make_plan):
    model, plain = mixture(base, "mixtral"), mixture(base, "mixtral", output_router_logits=False)
    assert (model.answer_loss.router, plain.answer_loss.router) == (0.5, 0.0)
    assert model.answer_loss.plain_head
    assert mean_loss(model, tokens, TRAINING).loss == pytest.approx(mean_loss(plain, tokens, TRAINING).loss, abs=1e-6)
    plan = make_plan(max_local_steps=2)
    first, other = (train_round(one, tokens, plan, 0).points for one in (model, plain))
    assert first[0].loss == pytest.approx(other[0].loss, abs=1e-6)
    assert first[1].loss != other[1].loss
    gates = [one.lm.state_dict()["model.layers.0.mlp.gate.weight"] for one in (model, plain)]
    assert not torch.allclose(*gates, atol=1e-4)


def test_checkpointed_activations_give_the_same_gradient(base, tokens):
    model = mixture(base, "mixtral").train()
    plain = our_gradients(model, tokens[:6])
    model.zero_grad()
    model.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert off(our_gradients(model, tokens[:6]), plain) < 1e-5


def test_adapters_are_trained_with_the_routers_loss(base, tokens):
    found = []
    for asked in (True, False):
        model = mixture(base, "mixtral", output_router_logits=asked)
        add_adapters(model, PeftSpec(rank=2), seed=1)
        model.load_weights({name: tensor + 0.1 for name, tensor in model.weights().items()})
        found.append(our_gradients(model.train(), tokens[:6]))
    assert off(*found) > 1e-3


def test_a_router_loss_without_a_coefficient_is_refused_with_what_to_do(base):
    model = mixture(base, "mixtral")
    model.lm.router_aux_loss_coef = None
    vars(model.lm.config)["router_aux_loss_coef"] = None  # assigning it is refused
    expected = r"no coefficient \(router_aux_loss_coef or aux_loss_coef\); set one in .* config\.json"
    with pytest.raises(ModelError, match=expected):
        _ = model.answer_loss


def test_a_model_without_experts_has_no_router_to_train(base):
    tokenizer = LanguageModel.load(base[0]).tokenizer
    lm = small_model("llama", tokenizer, output_router_logits=True)
    assert LanguageModel.wrap(lm, tokenizer, max_length=64).answer_loss.router == 0
