"""Intervals of evaluations, and sums of them, on losses of real ones."""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fedsft_assets.evaluation.statistics.intervals import compare_pairs, score_jobs
from fedsft_assets.evaluation.statistics.moment_intervals import compare_pairs_by_moments, score_jobs_by_moments
from fedsft_assets.evaluation.statistics.moments import combine, moments
from fedsft_assets.evaluation.statistics.prompt_losses import Model, PromptLosses, ScoresError
from fedsft_assets.evaluation.statistics.score_table import by_prompt
from fedsft_assets_tests.evaluation.simulated_studies import ONE_SEED, PAIRS, real_losses, real_scores, score_table

# From records to prompts


def test_a_loss_is_all_losses_over_all_answer_tokens_however_prompts_group_them() -> None:
    wide, found = real_losses(), score_jobs(real_scores())
    assert found["base"].value == pytest.approx(wide["base"].sum() / wide["tokens"].sum(), rel=1e-12)
    seeds = [wide[name].sum() / wide["tokens"].sum() for name in wide if name.startswith("fedavg/")]
    assert found["fedavg"].value == pytest.approx(np.mean(seeds), rel=1e-12)
    assert found["fedavg"].deviation == pytest.approx(np.std(seeds, ddof=1), rel=1e-9)
    assert found["base"].deviation is None


def test_the_order_of_rows_and_a_second_call_change_nothing() -> None:
    table = score_table()
    shuffled = table.sample(frac=1, random_state=3)
    assert compare_pairs(by_prompt(table), PAIRS) == compare_pairs(by_prompt(shuffled), PAIRS)
    assert compare_pairs(by_prompt(table), PAIRS) != compare_pairs(by_prompt(table), PAIRS, seed=7)


def test_copies_of_answers_to_a_prompt_make_nothing_surer_and_copies_under_new_prompts_do() -> None:
    table = score_table(ONE_SEED)
    copies = [table.assign(record=table["record"] + f"/{n}") for n in range(4)]
    scattered = [copy.assign(prompt=copy["prompt"] + f"/{n}") for n, copy in enumerate(copies)]
    once, same, new = (
        compare_pairs(by_prompt(each), PAIRS[:1])[PAIRS[0]] for each in (table, pd.concat(copies), pd.concat(scattered))
    )
    assert (same.low, same.high) == pytest.approx((once.low, once.high), rel=1e-9)
    assert new.high - new.low == pytest.approx((once.high - once.low) / 2, rel=0.05)


def _with(column: str, value: float) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """Has this in place of what the first model's sixth record has."""
    return lambda table: table.assign(**{column: table[column].where(table.index != 5, value)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop(columns="prompt"), "no column prompt"),
        (lambda table: table.iloc[:0], "no row"),
        (_with("loss", math.nan), "alpaca: record record-5 of .* loss is nan; expected a finite loss"),
        (_with("loss", math.inf), "alpaca: record record-5 of .* loss is inf; expected a finite loss"),
        (_with("loss", -0.1), "alpaca: record record-5 of .* loss is -0.1; expected a finite loss, not below 0"),
        (_with("tokens", 0), "tokens is 0; expected at least one"),
        (_with("tokens", 999), "record-5 of .* has 999 answer tokens for alpaca, seed 1 and .* for fedavg, seed 1"),
        (lambda table: pd.concat([table, table.iloc[:1]]), "alpaca, seed 1: record record-0 of .* more than once"),
        (lambda table: table.iloc[1:], r"alpaca, seed 1 and fedavg, seed 1 were not .* \(747 and 748\)"),
    ],
)
def test_scores_that_do_not_compare_are_refused_with_the_record_named(
    change: Callable[[pd.DataFrame], pd.DataFrame], message: str
) -> None:
    with pytest.raises(ScoresError, match=message):
        by_prompt(change(score_table(["alpaca/1", "fedavg/1"])))


def test_a_job_without_scores_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ScoresError, match="fedprox has no scores; expected one of alpaca, base, combined"):
        compare_pairs(real_scores(), [("fedprox", "base")])


# Intervals


def test_the_interval_over_prompts_is_near_scipys_bootstrap_of_the_same_ratio() -> None:
    """With this many prompts every good method gives nearly the same; scipy's is BCa, of prompts summed before."""
    scores = real_scores(columns=ONE_SEED)
    index = {model.job: row for row, model in enumerate(scores.models)}
    for pair, found in compare_pairs(scores, PAIRS).items():
        difference = scores.losses[index[pair[0]]] - scores.losses[index[pair[1]]]
        theirs = stats.bootstrap(
            (difference, scores.tokens),
            lambda losses, tokens, axis: losses.sum(axis) / tokens.sum(axis),
            paired=True, n_resamples=4000, method="BCa", rng=5, batch=500,
        )  # fmt: skip
        width = found.high - found.low
        assert found.low == pytest.approx(theirs.confidence_interval.low, abs=0.06 * width)
        assert found.high == pytest.approx(theirs.confidence_interval.high, abs=0.06 * width)
        assert math.sqrt(found.parts.variance) == pytest.approx(theirs.standard_error, rel=0.05)


def test_pairing_by_record_makes_a_difference_surer_than_its_two_losses() -> None:
    scores = real_scores(columns=ONE_SEED)
    alone, pair = score_jobs(scores), compare_pairs(scores, PAIRS)["fedavg", "combined"]
    apart = math.hypot(*(alone[job].high - alone[job].low for job in ("fedavg", "combined")))
    assert pair.high - pair.low < apart / 2


def test_a_p_value_is_the_error_probability_at_which_the_interval_ends_at_zero() -> None:
    scores = real_scores(40, columns=ONE_SEED)
    found = compare_pairs(scores, [("fedavg", "combined")])["fedavg", "combined"]
    index = [model.job for model in scores.models].index("fedavg")
    for end in (found.low, found.high):
        losses = scores.losses.copy()
        losses[index] -= end * scores.tokens
        moved = compare_pairs(replace(scores, losses=losses), [("fedavg", "combined")])["fedavg", "combined"]
        assert moved.p_value == pytest.approx(0.05, abs=0.002)


def test_the_spread_of_seeds_widens_an_interval_and_paired_seeds_take_out_what_they_share() -> None:
    scores = real_scores()
    shared = np.array([0.0 if model.seed is None else 0.2 * model.seed for model in scores.models])
    moved = replace(scores, losses=scores.losses + shared[:, None] * scores.tokens)
    alone, before = (score_jobs(each)["fedavg"] for each in (moved, scores))
    assert alone.high - alone.low > 2 * (before.high - before.low)
    pair = ("fedavg", "combined")
    paired, as_before = (compare_pairs(each, [pair])[pair] for each in (moved, scores))
    assert (paired.low, paired.high) == pytest.approx((as_before.low, as_before.high), rel=1e-6)
    others = tuple(
        model._replace(seed=model.seed + 100) if model.job == "combined" else model for model in moved.models
    )
    unpaired = compare_pairs(replace(moved, models=others), [pair])[pair]
    assert unpaired.high - unpaired.low > 3 * (paired.high - paired.low)


def test_variance_by_source_adds_up_to_what_drawing_prompts_and_seeds_anew_gives() -> None:
    """Crossed effects of known size: the mean of the estimates is the variance of the means."""
    generator, prompts, seeds, found, values = np.random.default_rng(4), 60, 4, [], []
    models = tuple(Model("job", seed) for seed in range(seeds))
    tokens = np.full(prompts, 10.0)
    for _ in range(800):
        losses = 30 + generator.normal(size=(seeds, 1)) + 4 * generator.normal(size=prompts)
        losses = losses + 6 * generator.normal(size=(seeds, prompts))
        parts = score_jobs(PromptLosses(models, tokens, losses, prompts), resamples=20)["job"].parts
        found.append((parts.variance, parts.prompts, parts.seeds[0].shared))
        values.append(parts.value)
    variance, of_prompts, shared = np.mean(found, axis=0)
    assert variance == pytest.approx(np.var(values), rel=0.15)
    assert of_prompts == pytest.approx(4**2 / prompts / 10**2, rel=0.05)
    assert shared == pytest.approx(6**2 / (prompts * seeds) / 10**2, rel=0.05)


def test_fifteen_pairs_on_ten_thousand_records_take_seconds() -> None:
    generator = np.random.default_rng(1)
    jobs = [f"job-{index:02}" for index in range(16)]
    tokens = generator.integers(1, 200, size=10_000).astype(float)
    losses = tokens * (3 + generator.gamma(2, 0.5, size=(16, 10_000)))
    scores = PromptLosses(tuple(Model(job, 1) for job in jobs), tokens, losses, 10_000)
    started = time.process_time()
    compare_pairs(scores, [(jobs[0], other) for other in jobs[1:]], resamples=2000)
    assert time.process_time() - started < 5


# Sums of private sites


def test_sums_alone_give_the_intervals_of_the_bootstrap_within_a_tenth_of_their_width() -> None:
    scores = real_scores()
    own, told = compare_pairs(scores, PAIRS), compare_pairs_by_moments(moments(scores), PAIRS)
    for pair in PAIRS:
        width = own[pair].high - own[pair].low
        assert told[pair].value == pytest.approx(own[pair].value, rel=1e-12)
        assert told[pair].low == pytest.approx(own[pair].low, abs=0.1 * width)
        assert told[pair].high == pytest.approx(own[pair].high, abs=0.1 * width)
        assert told[pair].parts.variance == pytest.approx(own[pair].parts.variance, rel=0.02)
    assert score_jobs_by_moments(moments(scores))["fedavg"].deviation == pytest.approx(
        score_jobs(scores)["fedavg"].deviation, rel=1e-9
    )


def test_sums_of_sites_add_up_to_those_of_all_their_prompts_together() -> None:
    scores = real_scores()
    ends = [0, 25, 300, scores.prompts]
    sites = {
        f"site-{number}": moments(
            replace(scores, tokens=scores.tokens[a:b], losses=scores.losses[:, a:b], records=b - a)
        )
        for number, (a, b) in enumerate(pairwise(ends), start=1)
    }
    together = combine(sites)
    assert together.measured is not None
    assert together.means_only == ()
    assert together.measured.prompts == together.everywhere.prompts == scores.prompts
    whole = compare_pairs_by_moments(moments(scores), PAIRS)
    for pair, found in compare_pairs_by_moments(together.measured, PAIRS).items():
        assert (found.value, found.low, found.high) == pytest.approx(
            (whole[pair].value, whole[pair].low, whole[pair].high), rel=1e-9
        )


def test_fewer_than_twenty_prompts_tell_counts_and_sums_alone_and_are_in_no_interval() -> None:
    scores = real_scores()
    few = moments(replace(scores, tokens=scores.tokens[:19], losses=scores.losses[:, :19], records=19))
    assert few.products is None
    assert few.sums[0] == scores.tokens[:19].sum()
    with pytest.raises(ScoresError, match="19 prompts with counts and sums alone"):
        compare_pairs_by_moments(few, PAIRS)
    rest = moments(
        replace(scores, tokens=scores.tokens[19:], losses=scores.losses[:, 19:], records=scores.prompts - 19)
    )
    together = combine({"site-1": few, "site-2": rest})
    assert together.means_only == ("site-1",)
    assert together.measured is not None
    assert together.measured.prompts == scores.prompts - 19
    assert together.everywhere.prompts == scores.prompts
    assert together.everywhere.sums == pytest.approx(moments(scores).sums)
    assert combine({"site-1": few}).measured is None


def test_sites_that_scored_other_models_are_not_added_up() -> None:
    sites = {
        "site-1": moments(real_scores(columns=["base", "fedavg/1"])),
        "site-2": moments(real_scores(columns=["base"])),
    }
    with pytest.raises(ScoresError, match="site-1 scored base, fedavg, seed 1, site-2 scored base; score the same"):
        combine(sites)
    with pytest.raises(ScoresError, match="no site"):
        combine({})
