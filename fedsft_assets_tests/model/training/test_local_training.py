import math

import pytest
import torch

from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.training.local_training import Loss, TrainingError, mean_loss, round_batches, train_round
from fedsft_assets.model.training.optimizer import build_optimizer
from fedsft_assets.specs.job import FiltersSpec, PrivacySpec, TrainingSpec
from fedsft_assets.specs.model_preset import PRESETS

TRAINING = PRESETS["tiny"].resolve(TrainingSpec())


def test_training_lowers_the_loss_and_reports_what_it_did(model, tokens, make_plan):
    before = mean_loss(model, tokens, TRAINING)
    seen = []
    report = train_round(model, tokens, make_plan(local_epochs=4), 0, seen.append)
    after = mean_loss(model, tokens, TRAINING)
    assert after.loss < 0.6 * before.loss
    assert seen == report.points
    assert report.steps == len(seen) == make_plan(local_epochs=4).work.steps(len(tokens)) == 20
    assert report.samples == 4 * len(tokens) == seen[-1].samples
    assert report.tokens == 4 * sum(one.targets() for one in tokens) == sum(point.tokens for point in seen)
    assert report.all_tokens == 4 * sum(len(one) for one in tokens)
    assert report.loss == pytest.approx(sum(p.loss * p.tokens for p in seen) / report.tokens)
    assert seen[0].loss == pytest.approx(before.loss, rel=0.1)
    assert [point.step for point in seen] == list(range(1, 21))


def test_learning_rate_follows_one_warm_up_and_cosine_over_all_rounds(model, tokens, make_plan):
    plan = make_plan(rounds=3, local_epochs=2, warmup_ratio=0.2, learning_rate=1e-3)
    rates = [point.learning_rate for round in range(3) for point in train_round(model, tokens, plan, round).points]
    total, warmup = 30, 6

    def formula(step: int) -> float:
        if step <= warmup:
            return 1e-3 * (step + 1) / (warmup + 1)
        return 1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))

    assert rates == pytest.approx([formula(step) for step in range(total)], rel=1e-9)


def test_a_repeated_round_gives_identical_weights(model, base, tokens, make_plan):
    start = model.weights()
    train_round(model, tokens, make_plan(), 1)
    first = model.weights()
    torch.manual_seed(99)
    again = LanguageModel.load(base[0])
    train_round(again, tokens, make_plan(), 0)
    again.load_weights(start)
    train_round(again, tokens, make_plan(), 1)
    assert all(torch.equal(first[name], tensor) for name, tensor in again.weights().items())


def test_sites_and_rounds_see_the_records_in_another_order(model, tokens, make_plan):
    start = model.weights()

    def first_loss(site: str, round: int) -> float:
        model.load_weights(start)
        return train_round(model, tokens, make_plan(site=site, max_local_steps=1), round).points[0].loss

    assert len({first_loss("site-1", 0), first_loss("site-2", 0), first_loss("site-1", 1)}) == 3


@pytest.mark.parametrize("packed", [True, False])
def test_rows_are_trained_on_as_they_come_and_padded_records_by_length_within_small_windows(
    model, tokens, make_plan, packed, monkeypatch
):
    model.answer_loss.packs = packed
    plan, seen = make_plan(batch_size=2), []
    make = model.answer_loss.batch

    def watched(records, answer_only=True):
        seen.append([len(one) for one in records])
        return make(records, answer_only)

    monkeypatch.setattr(model.answer_loss, "batch", watched)
    train_round(model, tokens, plan, 0)
    assert seen == _lengths(tokens, round_batches(tokens, plan, 0, packed))
    differences = sum(max(batch) - min(batch) for batch in seen)
    shuffled = sum(max(batch) - min(batch) for batch in _lengths(tokens, round_batches(tokens, plan, 0, packed=True)))
    assert differences == shuffled if packed else differences < shuffled / 2


def _lengths(tokens, batches):
    return [[len(tokens[index]) for index in batch] for batch in batches]


def test_a_round_is_cut_by_max_local_steps_and_counts_its_samples(model, tokens, make_plan):
    plan = make_plan(rounds=3, local_epochs=2, max_local_steps=7)
    assert plan.work.steps(len(tokens)) == 7
    reports = [train_round(model, tokens, plan, round) for round in range(2)]
    assert [report.steps for report in reports] == [7, 7]
    # 18 records: the first pass has 4 batches of 4 and one of 2, the second is cut after two of 4.
    assert [report.samples for report in reports] == [26, 26] == [plan.work.samples(len(tokens))] * 2
    assert [report.points[-1].samples for report in reports] == [26, 52]


def test_a_part_of_an_epoch_is_drawn_anew_in_each_round(model, tokens, make_plan):
    plan = make_plan(rounds=4, local_epochs=0.5)  # 18 records: 4 batches of 4 and one of 2
    assert plan.work.steps(len(tokens)) == 2
    reports = [train_round(model, tokens, plan, round) for round in range(2)]
    assert [report.samples for report in reports] == [8, 8] == [plan.work.samples(len(tokens))] * 2
    first, second = (round_batches(tokens, plan, round, packed=True) for round in range(2))
    assert first != second
    one_and_a_half = make_plan(local_epochs=1.5)
    batches = round_batches(tokens, one_and_a_half, 0, packed=True)
    assert len(batches) == one_and_a_half.work.steps(len(tokens)) == 8
    assert sorted(index for batch in batches[:5] for index in batch) == list(range(18))
    assert make_plan(local_epochs=0.01).work.steps(len(tokens)) == 1


def test_biases_and_norms_do_not_decay(model):
    groups = build_optimizer(model.parameters(), 1e-3, weight_decay=0.1, fused=True, moments=None).param_groups
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert names
    assert all(name.endswith("weight") and ".ln_" not in name for name in names)
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_training_writes_no_file_and_says_nothing(model, tokens, make_plan, tmp_path, monkeypatch, capfd, recwarn):
    monkeypatch.chdir(tmp_path)
    train_round(model, tokens, make_plan(), 0)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")
    assert [str(warning.message) for warning in recwarn] == []


def test_a_loss_that_is_not_finite_stops_with_site_round_and_step(model, tokens, make_plan):
    weights = model.weights()
    weights["lm.transformer.wte.weight"].fill_(math.nan)
    model.load_weights(weights)
    with pytest.raises(TrainingError, match="site-2: the loss is nan in round 2, step 1 of 5"):
        train_round(model, tokens, make_plan(site="site-2"), 1)


@pytest.mark.parametrize(
    ("noise", "round", "says", "and_not"),
    [
        (
            1e9,
            1,
            r"round 2, step 1 of 5, under noise of \S+ times clip from each site in each round; try a lower fi",
            "rate",
        ),
        (1e9, 0, "try a lower one or precision 32$", "noise"),  # of which the base model has none
        (
            1e-3,
            1,
            "try a lower one or precision 32, or a lower filters.privacy.noise_multiplier: there is noise of",
            "—",
        ),
    ],
)
def test_loss_that_is_not_finite_under_much_noise_is_the_noises_fault(
    model, tokens, make_plan, noise, round, says, and_not
):
    weights = model.weights()
    weights["lm.transformer.wte.weight"].fill_(math.nan)
    model.load_weights(weights)
    plan = make_plan().model_copy(update={"filters": FiltersSpec(privacy=PrivacySpec(clip=1, noise_multiplier=noise))})
    with pytest.raises(TrainingError, match=says) as told:
        train_round(model, tokens, plan, round)
    assert and_not not in str(told.value)


def test_no_records_are_an_error_that_names_the_site(model, make_plan):
    with pytest.raises(TrainingError, match=r"site-1: no records to train on in training\.jsonl"):
        train_round(model, [], make_plan(), 0)
    with pytest.raises(TrainingError, match="no answer tokens"):
        mean_loss(model, [], TRAINING)


def test_an_error_in_a_callback_reaches_the_caller_and_the_model_trains_on(model, tokens, make_plan):
    def interrupt(_: object) -> None:
        raise ConnectionError("server is gone")

    with pytest.raises(ConnectionError, match="server is gone"):
        train_round(model, tokens, make_plan(), 0, interrupt)
    assert train_round(model, tokens, make_plan(), 0).steps == 5


def test_mean_loss_does_not_depend_on_the_batches(model, tokens):
    sizes = (1, 5, len(tokens))
    losses = [mean_loss(model, tokens, TRAINING.model_copy(update={"batch_size": size})) for size in sizes]
    assert {loss.tokens for loss in losses} == {sum(one.targets() for one in tokens)}
    assert [loss.loss for loss in losses] == pytest.approx([losses[0].loss] * 3, abs=1e-5)


def test_mean_loss_takes_no_gradient(model, tokens):
    mean_loss(model, tokens[:2], TRAINING)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_perplexity_is_the_exponential_of_the_loss():
    assert Loss(2.0, 10).perplexity == pytest.approx(7.38905609893065)
    assert Loss(1e4, 10).perplexity == math.inf
