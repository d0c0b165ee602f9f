"""One device: the same gradients however a batch is cut, mixed precision, and what `auto` means where."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.training.batches import Tokens
from fedsft_assets.model.training.devices.interface import OneDevice, precisions, untried
from fedsft_assets.model.training.local_training import RoundReport, train_round
from fedsft_assets.specs.plan import SitePlan
from fedsft_assets_tests.model.weights import assert_same_weights

MakePlan = Callable[..., SitePlan]


class Watched(OneDevice):
    """Keeps the gradients of the first step as they are before and after clipping, and counts micro-batches."""

    def __init__(self, model: LanguageModel, precision: str = "32") -> None:
        super().__init__(model, precision)  # type: ignore[arg-type]
        self.passes = 0
        self.gradients: dict[str, Tensor] = {}
        self.clipped: dict[str, Tensor] = {}

    def add_gradients(self, batch, scale: float, last: bool) -> Tensor:  # type: ignore[no-untyped-def]
        self.passes += 1
        return super().add_gradients(batch, scale, last)

    def step(self, optimizer: torch.optim.Optimizer, clip: float) -> None:
        first = not self.gradients
        if first:
            self.gradients = self._now()
        zero_grad, optimizer.zero_grad = optimizer.zero_grad, lambda **_: None  # type: ignore[method-assign]
        super().step(optimizer, clip)
        if first:
            self.clipped = self._now()
        optimizer.zero_grad = zero_grad  # type: ignore[method-assign]
        optimizer.zero_grad()

    def _now(self) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}


def _train(
    model: LanguageModel, tokens: list[Tokens], plan: SitePlan
) -> tuple[Watched, RoundReport, dict[str, Tensor]]:
    start = model.weights()
    devices = Watched(model, plan.training.precision)
    report = train_round(model, tokens, plan, 0, devices=devices)
    trained = model.weights()
    model.load_weights(start)
    return devices, report, trained


def _norm(gradients: dict[str, Tensor]) -> float:
    return torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()


@pytest.mark.parametrize("answer_only", [True, False], ids=["answers", "all tokens"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(
    "cut",
    [
        {"micro_batch_size": 4},
        {"micro_batch_size": 1},
        {"micro_batch_size": 3, "micro_batch_tokens": 100},
        {"micro_batch_tokens": 64},
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "micro_batch_size": 4},
    ],
    ids=str,
)
def test_a_step_does_not_depend_on_how_its_batch_is_computed(
    model: LanguageModel,
    tokens: list[Tokens],
    make_plan: MakePlan,
    packed: bool,
    answer_only: bool,
    cut: dict[str, int],
) -> None:
    if packed:
        assert model.answer_loss.packs
    model.answer_loss.packs = packed
    common = {
        **{"batch_size": 8, "precision": "32", "learning_rate": 3e-4, "gradient_clip": 0.0},
        "answer_only_loss": answer_only,
    }
    whole, whole_report, whole_weights = _train(model, tokens, make_plan(**common))
    parts, report, weights = _train(model, tokens, make_plan(**common, **cut))

    assert whole.passes == whole_report.steps == report.steps == 3
    assert parts.passes > 3 or set(cut) == {"activation_checkpointing"}
    assert parts.gradients.keys() == whole.gradients.keys() == dict(model.named_parameters()).keys()
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(parts.gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    assert [point.loss for point in report.points] == pytest.approx([p.loss for p in whole_report.points], abs=1e-5)
    # AdamW's steps are as long for small gradients, whose rounding shows: a tenth of the learning rate.
    assert_same_weights(weights, whole_weights, atol=3e-5)


def test_gradients_are_those_of_the_mean_over_the_tokens_of_the_batch(
    model: LanguageModel, tokens: list[Tokens], make_plan: MakePlan
) -> None:
    plan = make_plan(batch_size=len(tokens), micro_batch_size=5, precision="32", gradient_clip=0.0)
    devices, _, _ = _train(model, tokens, plan)
    # The plain way, record by record, through Hugging Face's own loss.
    total = torch.zeros(())
    model.eval()  # the tiny model has dropout only if its configuration says so
    for one in tokens:
        labels = torch.tensor([[-100] * one.prompt + one.ids[one.prompt :]])
        total = total + model.lm(input_ids=torch.tensor([one.ids]), labels=labels).loss * one.targets()
    (total / sum(one.targets() for one in tokens)).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(devices.gradients[name], parameter.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_clipping_scales_gradients_down_to_the_norm_and_never_up(
    model: LanguageModel, tokens: list[Tokens], make_plan: MakePlan
) -> None:
    free, _, _ = _train(model, tokens, make_plan(precision="32", max_local_steps=1, gradient_clip=0.0))
    norm = _norm(free.gradients)
    assert _norm(free.clipped) == pytest.approx(norm)
    for clip, expected in ((norm / 10, norm / 10), (norm * 10, norm)):
        clipped, _, _ = _train(model, tokens, make_plan(precision="32", max_local_steps=1, gradient_clip=clip))
        assert _norm(clipped.gradients) == pytest.approx(norm, rel=1e-5)
        assert _norm(clipped.clipped) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_computes_in_16_bits_and_trains_like_fp32(
    model: LanguageModel, tokens: list[Tokens], make_plan: MakePlan, precision: str
) -> None:
    assert model.answer_loss.packs  # tried out in fp32, before anything is watched
    seen = set()
    layer = model.lm.transformer.h[0].mlp
    handle = layer.register_forward_hook(lambda _module, _args, output: seen.add(output.dtype))
    _, mixed, weights = _train(model, tokens, make_plan(precision=precision, learning_rate=1e-3, local_epochs=2))
    handle.remove()
    _, exact, _ = _train(model, tokens, make_plan(precision="32", learning_rate=1e-3, local_epochs=2))

    assert seen == {torch.bfloat16 if precision == "bf16-mixed" else torch.float16}
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert mixed.points[0].loss == pytest.approx(exact.points[0].loss, rel=5e-3)
    assert mixed.points[-1].loss < 0.8 * mixed.points[0].loss
    # Steps of fp16 that overflow are left out, so it may lag behind.
    assert mixed.points[-1].loss == pytest.approx(exact.points[-1].loss, rel=0.02 if precision == "bf16-mixed" else 0.2)


def test_clipping_in_fp16_sees_gradients_without_their_scale(
    model: LanguageModel, tokens: list[Tokens], make_plan: MakePlan
) -> None:
    plan = make_plan(precision="16-mixed", max_local_steps=1, gradient_clip=1e-2)
    devices, _, _ = _train(model, tokens, plan)
    finite = all(gradient.isfinite().all() for gradient in devices.gradients.values())
    assert finite
    assert _norm(devices.gradients) > 1e3  # as scaled for fp16
    assert _norm(devices.clipped) == pytest.approx(1e-2, rel=1e-3)


@pytest.mark.parametrize(
    ("capabilities", "choices"),
    [
        ({}, ["32"]),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, ["32"]),
        ({"avx512_bf16": True}, ["32", "bf16-mixed"]),
        ({"amx_bf16": True}, ["32", "bf16-mixed"]),
        ({"bf16": True}, ["32", "bf16-mixed"]),
    ],
)
def test_auto_on_a_cpu_is_fp32_unless_bf16_is_tried_where_it_is_not_emulated(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], choices: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert precisions() == choices
    assert untried("auto") == "32"


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16-mixed"), (False, "32")])
def test_auto_is_bf16_on_a_gpu_that_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, native: bool, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    # An emulated bf16 is none.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert precisions() == [untried("auto")] == [expected]


@pytest.mark.parametrize("precision", ["32", "bf16-mixed", "16-mixed"])
def test_a_precision_that_is_said_stays(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert untried(precision) == precision  # type: ignore[arg-type]


def test_schedule_of_a_round_begins_anew_and_that_of_a_job_goes_on(
    model: LanguageModel, tokens: list[Tokens], make_plan: MakePlan
) -> None:
    def rates(span: str) -> list[list[float]]:
        plan = make_plan(rounds=2, local_epochs=2, learning_rate=1e-3, warmup_ratio=0.2, learning_rate_schedule=span)
        return [[p.learning_rate for p in train_round(model, tokens, plan, round).points] for round in range(2)]

    first, second = rates("round")
    assert first == second
    assert first[0] == pytest.approx(1e-3 / 3)  # 10 steps, of which 2 warm up
    assert max(first) == first[2] == pytest.approx(1e-3)
    assert first[-1] < 2e-4
    first, second = rates("job")
    assert first[0] == pytest.approx(1e-3 / 5)  # 20 steps, of which 4 warm up
    assert max(first + second) == first[4] == pytest.approx(1e-3)
    assert first[-1] > second[0] > second[-1]
    assert second[-1] < 2e-4
