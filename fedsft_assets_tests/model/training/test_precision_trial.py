"""What `auto` becomes: the precision in which real passes of the model at hand are faster, and nothing else of it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.training.batches import Tokens
from fedsft_assets.model.training.devices.interface import precisions
from fedsft_assets.model.training.precision_trial import faster_precision
from fedsft_assets.specs.plan import SitePlan
from fedsft_assets_tests.model.slower import slower_in

MakePlan = Callable[..., SitePlan]


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that says it computes in bf16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})


@pytest.mark.usefixtures("both")
@pytest.mark.parametrize(("slow", "expected"), [("32", "bf16-mixed"), ("bf16-mixed", "32")])
@pytest.mark.parametrize("cut", [{}, {"micro_batch_size": 2}, {"activation_checkpointing": True}], ids=str)
def test_faster_of_two_precisions_is_taken(
    model: LanguageModel, tokens: list[Tokens], make_plan: MakePlan, slow: str, expected: str, cut: dict[str, int]
) -> None:
    with slower_in(model, slow, seconds=0.1):
        trial = faster_precision(model, tokens, make_plan(**cut))
    assert trial.precision == expected
    assert "bf16-mixed has " in trial.why
    assert " times the speed of 32 with this model" in trial.why


@pytest.mark.usefixtures("both")
def test_trial_leaves_weights_gradients_and_random_state_as_they_were(
    model: LanguageModel, tokens: list[Tokens], make_plan: MakePlan
) -> None:
    before, state = model.weights(), torch.random.get_rng_state()
    faster_precision(model, tokens, make_plan())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.weights().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_nothing_is_tried_where_there_is_no_choice_or_no_record(
    model: LanguageModel, tokens: list[Tokens], make_plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    with _no_pass(model):
        assert faster_precision(model, tokens, make_plan()).precision == "32"
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
        assert faster_precision(model, [], make_plan()).precision == "32"


@pytest.mark.skipif("bf16-mixed" not in precisions(), reason="this processor does not compute in bf16")
def test_wide_layers_are_faster_in_bf16_on_a_processor_that_has_it(model: LanguageModel, make_plan: MakePlan) -> None:
    config = GPT2Config(vocab_size=model.lm.config.vocab_size, n_layer=1, n_embd=1024, n_head=8, n_positions=256)
    wide = LanguageModel.wrap(GPT2LMHeadModel(config), model.tokenizer, 256)
    tokens = [Tokens(list(range(length)), prompt=length // 2) for length in range(100, 180, 10)]
    assert faster_precision(wide, tokens, make_plan(batch_size=4)).precision == "bf16-mixed"


@contextmanager
def _no_pass(model: LanguageModel) -> Iterator[None]:
    def refuse(*_: object) -> None:
        raise AssertionError("a pass was made")

    handle = model.lm.register_forward_pre_hook(refuse)
    body = model.lm.base_model.register_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()
        body.remove()
