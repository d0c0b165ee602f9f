"""A site's trainer with a real tiny model: what it is given, what it sends, and what it says meanwhile."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType

from fedsft_assets.federation.protocol.costs import COSTS_OF_A_SITE, CPU_SECONDS, PEAK_MEMORY, is_cost
from fedsft_assets.federation.protocol.messages import (
    FIRST_KEY,
    KIND_KEY,
    SAMPLES_KEY,
    VERSION,
    VERSION_KEY,
    Kind,
)
from fedsft_assets.federation.protocol.phases import PhaseClock, metric_name
from fedsft_assets.federation.protocol.points import Point, points_to_data
from fedsft_assets.federation.protocol.site_messages import PointMessage, RoundLimits, points_of
from fedsft_assets.federation.server.aggregation import TokenWeightedAverage
from fedsft_assets.federation.server.controller import FederatedSFT
from fedsft_assets.federation.site.global_model import ExchangeError
from fedsft_assets.federation.site.precision import site_precision
from fedsft_assets.federation.site.trainer import SiteTrainer
from fedsft_assets.model.base_model import create_base_model
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.training.local_training import mean_loss
from fedsft_assets.specs.job import PeftSpec, Precision, TrainingSpec
from fedsft_assets.specs.model_preset import PRESETS
from fedsft_assets.specs.plan import SitePlan
from fedsft_assets_tests.federation.lazy import materialize
from fedsft_assets_tests.model.slower import slower_in

Weights = dict[str, torch.Tensor]
_COLOURS = {"grass": "green", "snow": "white", "coal": "black", "blood": "red", "the sea": "blue", "gold": "yellow"}
RECORDS = [{"input": f"What is the colour of {thing}?", "output": colour} for thing, colour in _COLOURS.items()] * 2


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, and records to train on and to validate on."""
    folder = tmp_path_factory.mktemp("site")
    texts = [f"{record['input']}\n\nAnswer: {record['output']}" for record in RECORDS]
    create_base_model(PRESETS["tiny"], folder / "tiny.nemo", 7, texts)
    for name, records in (("training", RECORDS), ("validation", RECORDS[:5])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


class Heard(list[tuple[str, list[Point]]]):
    """What a trainer told."""

    def __call__(self, text: str, points: list[Point]) -> None:
        self.append((text, points))

    @property
    def texts(self) -> list[str]:
        return [text for text, _ in self]

    @property
    def points(self) -> list[Point]:
        return [point for _, points in self for point in points]


class _Trainer(SiteTrainer):
    """Whose results are as they arrive at the server."""

    def train(self, received: FLModel) -> FLModel:
        result = super().train(received)
        result.params = {name: materialize(tensor) for name, tensor in result.params.items()}
        return result


MakeTrainer = Callable[..., SiteTrainer]


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def make_trainer(files: Path, heard: Heard) -> MakeTrainer:
    def make(
        site: str = "site-1",
        state: Path | None = None,
        peft: PeftSpec | None = None,
        precision: Precision = "32",
        **plan: object,
    ) -> SiteTrainer:
        training = TrainingSpec(batch_size=4, learning_rate=3e-3, max_length=64, peft=peft)
        given = SitePlan(
            job="fedavg",
            site=site,
            rounds=3,
            **{"local_epochs": 1, "max_local_steps": 2, **plan},
            max_evaluation_records=None,
            seed=1,
            training=replace(PRESETS["tiny"], precision=precision).resolve(training),
            base_model=files / "tiny.nemo",
            training_file=files / "training.jsonl",
            validation_file=files / "validation.jsonl",
            digests={},
        )
        return _Trainer(given, PhaseClock(), heard, state)

    return make


@pytest.fixture(scope="module")
def base(files: Path) -> Weights:
    return LanguageModel.load(files / "tiny.nemo").weights()


def _copy(weights: Weights) -> Weights:
    return {name: tensor.clone() for name, tensor in weights.items()}


def _same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def _sent(params: Weights, round_number: int = 0, kind: Kind = Kind.FULL, version: str = VERSION) -> FLModel:
    """A task as the server sends it."""
    return FLModel(
        params=_copy(params),
        params_type=ParamsType.FULL,
        current_round=round_number,
        total_rounds=3,
        meta={KIND_KEY: str(kind), VERSION_KEY: version},
    )


def _limits(trainer: SiteTrainer) -> RoundLimits:
    plan = trainer.plan
    return RoundLimits(
        work=plan.work,
        precision=plan.training.precision,
        max_length=plan.training.max_length,
        validation_records=len(trainer.validation),
        records={plan.site: len(trainer.training)},
    )


# What travels.


@pytest.mark.parametrize("changes", [{"local_epochs": 1}, {"local_epochs": 2, "max_local_steps": None}])
def test_what_a_site_says_is_within_what_the_server_believes(
    make_trainer: MakeTrainer, base: Weights, heard: Heard, changes: dict[str, Any]
) -> None:
    trainer = make_trainer(**changes)
    limits, records = _limits(trainer), len(trainer.training)

    def arrived(number: int) -> list[PointMessage]:
        messages = []
        for text, points in heard:
            report = limits.report(json.dumps({"id": "1", "text": text, "points": points_to_data(points)}), number)
            assert points_of("site-1", report.points) == points
            messages += report.points
        heard.clear()
        return messages

    for number in range(2):
        result = trainer.train(_sent(base, number))
        update = limits.update(result.meta, arrived(number), number, records)
        assert (update.kind, update.records) == ("change", records)
    trainer.evaluate(_sent(base, 2))
    limits.score(arrived(2), 2, records)


def test_change_that_a_site_sends_is_what_it_trained_minus_what_it_was_given(
    make_trainer: MakeTrainer, base: Weights
) -> None:
    trainer = make_trainer()
    given = {name: tensor * 1.01 for name, tensor in base.items()}
    result = trainer.train(_sent(given))
    trained = dict(trainer.devices.weights())
    assert result.meta[KIND_KEY] == "change"
    assert _same(result.params, {name: trained[name] - given[name] for name in given})
    assert any(change.abs().max() > 0 for change in result.params.values())


def test_site_trains_from_what_it_is_given_not_from_what_it_had(make_trainer: MakeTrainer, base: Weights) -> None:
    trainer = make_trainer()
    first = trainer.train(_sent(base)).params
    trainer.moments = None
    again = trainer.train(_sent(base)).params
    assert _same(first, again)


def test_in_fp32_a_site_keeps_no_copy_of_what_it_was_given(make_trainer: MakeTrainer, base: Weights) -> None:
    trainer = make_trainer()
    trainer.train(_sent(base))
    assert trainer.exchange.given == {}


def test_bf16_change_is_the_rounded_one_of_fp32(make_trainer: MakeTrainer, base: Weights) -> None:
    exact = make_trainer().train(_sent(base)).params
    rounded = make_trainer(wire="bf16-diff").train(_sent(base)).params
    assert _same(rounded, {name: change.to(torch.bfloat16) for name, change in exact.items()})


def test_with_bf16_changes_every_site_has_the_servers_model_bit_for_bit(
    make_trainer: MakeTrainer, base: Weights, tmp_path: Path
) -> None:
    trainers = [make_trainer(site, wire="bf16-diff") for site in ("site-1", "site-2")]
    limits = _limits(trainers[0]).model_dump()
    server = FederatedSFT(["site-1", "site-2"], num_rounds=3, limits=limits, base_model="base.nemo", wire="bf16-diff")
    server.open(tmp_path / "state")
    server.global_model.weights = _copy(base)
    kinds = [[Kind.FULL, Kind.FULL], [Kind.CHANGE, Kind.CHANGE], [Kind.CHANGE, Kind.FULL], [Kind.CHANGE] * 2]
    for number, by_site in enumerate(kinds):
        before = _copy(server.global_model.weights)
        average = TokenWeightedAverage({name: tuple(tensor.shape) for name, tensor in before.items()})
        for trainer, kind in zip(trainers, by_site, strict=True):
            task = _sent(server.global_model.weights if kind == Kind.FULL else server.global_model.change, number, kind)
            if number == 3:
                trainer.evaluate(task)
            else:
                result = trainer.train(task)
                assert all(change.dtype == torch.bfloat16 for change in result.params.values())
                average.add(trainer.plan.site, result.params, result.meta[FLMetaKey.NUM_STEPS_CURRENT_ROUND])
            assert _same(trainer.exchange.given, before)
        assert _same(dict(trainers[0].devices.weights()), dict(trainers[1].devices.weights())) == (number == 3)
        if number < 3:
            server.global_model.apply(average)
            assert not _same(server.global_model.weights, before)
    assert _same(dict(trainers[0].devices.weights()), server.global_model.weights)


def test_without_a_model_of_the_servers_a_site_begins_with_its_own_adapters_and_sends_them_whole(
    make_trainer: MakeTrainer,
) -> None:
    trainers = [make_trainer(site, peft=PeftSpec(rank=2)) for site in ("site-1", "site-2")]
    first, other = (trainer.train(_sent({})) for trainer in trainers)
    assert first.meta[KIND_KEY] == other.meta[KIND_KEY] == "full"
    assert first.meta[FIRST_KEY] == other.meta[FIRST_KEY]
    assert _same(trainers[0].exchange.first, trainers[1].exchange.first)
    trained = dict(trainers[0].devices.weights())
    assert first.params.keys() == trained.keys()
    for name, tensor in first.params.items():
        torch.testing.assert_close(tensor, trained[name], rtol=0, atol=1e-7)
    given = {name: tensor / 2 for name, tensor in trained.items()}
    second = trainers[0].train(_sent(given, 1))
    assert second.meta[KIND_KEY] == "change"
    now = dict(trainers[0].devices.weights())
    assert _same(second.params, {name: now[name] - given[name] for name in given})


def test_excluded_tensors_never_leave_a_site(make_trainer: MakeTrainer, base: Weights) -> None:
    name = next(name for name in base if name.endswith("bias"))
    result = make_trainer(filters={"exclude": ["bias$"]}).train(_sent(base))
    assert result.params.keys() == {name for name in base if not name.endswith("bias")}
    assert name not in result.params


PRIVATE = {"privacy": {"clip": 0.5, "noise_multiplier": 0.01}}
STEP = 2.0**-24  # of noise of 0.005


@pytest.mark.parametrize("wire", ["fp32", "bf16-diff"])
def test_private_change_is_clipped_and_has_noise_in_whole_steps_whatever_travels(
    make_trainer: MakeTrainer, base: Weights, wire: str
) -> None:
    exact = make_trainer().train(_sent(base)).params
    sent = make_trainer(wire=wire, filters=PRIVATE).train(_sent(base)).params
    norm = math.sqrt(sum(change.double().square().sum().item() for change in exact.values()))
    assert norm > 0.5
    noise = torch.cat([(sent[name].double() - exact[name] * (0.5 / norm)).view(-1) for name in exact])
    assert noise.std().item() == pytest.approx(0.005, rel=0.01)
    for change in sent.values():
        steps = change.double() / STEP
        assert torch.equal(steps, steps.round())


def test_private_adapters_that_are_sent_whole_have_noise_on_each_number(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(peft=PeftSpec(rank=2), filters=PRIVATE)
    sent = trainer.train(_sent({})).params
    change = torch.cat([(sent[name] - first).view(-1) for name, first in trainer.exchange.first.items()])
    assert change.norm().item() == pytest.approx(math.hypot(0.5, 0.005 * math.sqrt(change.numel())), rel=0.1)
    assert (change != 0).double().mean() > 0.999


@pytest.mark.parametrize("asked", [0, 1, 3])
def test_private_change_of_a_round_leaves_once_and_of_no_other_round(
    make_trainer: MakeTrainer, base: Weights, asked: int
) -> None:
    trainer = make_trainer(filters=PRIVATE)
    trainer.train(_sent(base, 1))
    with pytest.raises(
        ExchangeError, match=rf"^site-1: the server requested the change of round {asked + 1} of 3 after that of"
    ):
        trainer.train(_sent(base, asked))
    trainer.train(_sent(base, 2))


@pytest.mark.parametrize("version", ["0", None])
@pytest.mark.parametrize("task", ["train", "evaluate"])
def test_server_of_another_version_is_an_error_that_says_what_to_do(
    make_trainer: MakeTrainer, base: Weights, version: str, task: str
) -> None:
    trainer = make_trainer()
    message = (
        rf"^site-1: .* uses protocol version {version!r}, this site's package uses '{VERSION}'; install the version"
    )
    with pytest.raises(ExchangeError, match=message):
        getattr(trainer, task)(_sent(base, version=version))


def test_change_without_a_model_to_add_it_to_is_an_error(make_trainer: MakeTrainer, base: Weights) -> None:
    with pytest.raises(ExchangeError, match=r"^site-1: received a change, but has no model to apply it to$"):
        make_trainer(wire="bf16-diff").train(_sent(base, kind=Kind.CHANGE))


def test_model_that_is_not_the_sites_is_an_error_that_names_its_tensors(
    make_trainer: MakeTrainer, base: Weights
) -> None:
    name = next(iter(base))
    with pytest.raises(Exception, match=name.replace(".", r"\.")):
        make_trainer().evaluate(_sent({other: tensor for other, tensor in base.items() if other != name}))


# What is measured and told.


def test_result_says_how_much_was_trained_on(make_trainer: MakeTrainer, heard: Heard, base: Weights) -> None:
    trainer = make_trainer()
    result = trainer.train(_sent(base))
    steps = [point for point in heard.points if point.name == "train_loss"]
    assert [(point.round, point.step, point.samples, point.site) for point in steps] == [
        (1, 1, 4, "site-1"),
        (1, 2, 8, "site-1"),
    ]
    assert result.meta[SAMPLES_KEY] == 8
    assert result.meta[FLMetaKey.NUM_STEPS_CURRENT_ROUND] == sum(point.tokens or 0 for point in steps) > 0
    assert result.meta[FIRST_KEY] is None


def test_losses_are_those_of_the_given_and_of_the_trained_model(
    make_trainer: MakeTrainer, heard: Heard, base: Weights
) -> None:
    trainer = make_trainer()
    before = mean_loss(trainer.model, trainer.validation, trainer.plan.training)
    trainer.train(_sent(base, 1))
    after = mean_loss(trainer.model, trainer.validation, trainer.plan.training)
    points = {point.name: point for point in heard.points}
    assert points["val_loss"] == Point("val_loss", before.loss, 1, 8, "site-1", tokens=before.tokens)
    assert points["val_loss_local"] == Point("val_loss_local", after.loss, 2, 16, "site-1", tokens=after.tokens)
    assert before.loss != after.loss


def test_every_value_is_told_once_in_its_order(make_trainer: MakeTrainer, heard: Heard, base: Weights) -> None:
    trainer = make_trainer()
    for number in range(2):
        heard.clear()
        trainer.train(_sent(base, number))
        measured = [point for point in heard.points if not is_cost(point.name)]
        assert [point.name for point in measured] == ["val_loss", "train_loss", "train_loss", "val_loss_local"]
        assert len({point.identity for point in heard.points}) == len(heard.points)


def test_seconds_of_every_phase_are_told(make_trainer: MakeTrainer, heard: Heard, base: Weights) -> None:
    make_trainer().train(_sent(base))
    assert {metric_name(phase) for phase in ("load", "tokenize", "validate")} <= {point.name for point in heard.points}


def test_costs_are_told_with_the_score_of_the_model_that_came(
    make_trainer: MakeTrainer, heard: Heard, base: Weights
) -> None:
    make_trainer().train(_sent(base, 1))
    costs = {point.name: point for point in heard.points if point.name in COSTS_OF_A_SITE}
    assert {(point.round, point.samples) for point in costs.values()} == {(1, 8)}
    assert costs.keys() == set(COSTS_OF_A_SITE)
    assert 0 < costs[CPU_SECONDS].value <= time.process_time()
    assert costs[PEAK_MEMORY].value > 1 << 20


def test_what_is_told_names_round_and_step(make_trainer: MakeTrainer, heard: Heard, base: Weights) -> None:
    trainer = make_trainer()
    assert any("12 records to train on" in text for text in heard.texts)
    heard.clear()
    trainer.train(_sent(base, 1))
    assert not any("site-1" in text for text in heard.texts)  # whose word it is the server knows
    assert any(text.startswith("round 2 of 3 · step 2 of 2 · train_loss ") for text in heard.texts)
    assert any("val_loss" in text and "after 1 of 3 rounds" in text for text in heard.texts)


def test_evaluation_scores_and_changes_nothing(make_trainer: MakeTrainer, heard: Heard, base: Weights) -> None:
    trainer = make_trainer()
    result = trainer.evaluate(_sent(base, 3))
    assert not result.params
    assert [point.round for point in heard.points if point.name == "val_loss"] == [3]
    assert _same(dict(trainer.devices.weights()), base)


# A trainer that is started again.


def test_trainer_that_is_started_again_goes_on_as_if_it_had_not_ended(
    make_trainer: MakeTrainer, base: Weights, tmp_path: Path
) -> None:
    trainer = make_trainer(state=tmp_path / "kept")
    trainer.train(_sent(base, 0))
    expected = trainer.train(_sent(base, 1)).params
    for _ in range(2):  # also when the round is done again
        again = make_trainer(state=tmp_path / "kept")
        assert _same(again.train(_sent(base, 1)).params, expected)
    anew = make_trainer()
    assert not _same(anew.train(_sent(base, 1)).params, expected)


# What it computes in.


def test_trainer_that_is_started_again_computes_in_what_was_decided_also_after_its_last_score(
    make_trainer: MakeTrainer, heard: Heard, base: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, other = (make_trainer(precision=precision).train(_sent(base)) for precision in ("bf16-mixed", "32"))
    assert not _same(expected.params, other.params)
    first = make_trainer(precision="auto", state=tmp_path / "kept")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    with slower_in(first.model, "32", seconds=0.1):
        (tmp_path / "kept" / "precision.json").unlink()  # of what this machine found
        trial = site_precision(first.model, first.training, first.plan, tmp_path / "kept", lambda: None)
    assert trial.precision == "bf16-mixed"

    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # the machine is another now
    for _ in range(2):
        heard.clear()
        again = make_trainer(precision="auto", state=tmp_path / "kept")
        assert "cpu · precision bf16-mixed (as chosen at the start of this execution) · " in heard.texts[0]
        assert _same(again.train(_sent(base)).params, expected.params)
        again.evaluate(_sent(base, 3))
        assert [path.name for path in (tmp_path / "kept").iterdir()] == ["precision.json"]
