"""A thousand simulated studies at a time: how often intervals have the truth, and how often a verdict is wrong.

Each prints what it measured: `pytest -s`.
"""

from collections.abc import Callable

import numpy as np
import pytest

from fedsft_assets.evaluation.statistics.intervals import Estimate, Pair, compare_pairs
from fedsft_assets.evaluation.statistics.moment_intervals import compare_pairs_by_moments
from fedsft_assets.evaluation.statistics.moments import moments
from fedsft_assets.evaluation.statistics.power import detectable
from fedsft_assets.evaluation.statistics.prompt_losses import PromptLosses
from fedsft_assets.evaluation.statistics.verdicts import LEAST_PROMPTS, judge
from fedsft_assets_tests.evaluation.simulated_studies import PAIRS, Population, population

pytestmark = pytest.mark.slow

STUDIES = 1000
ALL = ("base", "alpaca", "dolly", "oasst1", "combined", "fedavg")
Compare = Callable[[PromptLosses, list[Pair]], dict[Pair, Estimate]]


def _by_bootstrap(scores: PromptLosses, pairs: list[Pair]) -> dict[Pair, Estimate]:
    return compare_pairs(scores, pairs, resamples=1000)


def _by_sums(scores: PromptLosses, pairs: list[Pair]) -> dict[Pair, Estimate]:
    return compare_pairs_by_moments(moments(scores), pairs)


def _coverage(
    compare: Compare, drawn_from: Population, pairs: list[Pair], prompts: int, seeds: int
) -> dict[str, float]:
    """Of each pair's interval over a thousand studies."""
    generator = np.random.default_rng(1000 * prompts + seeds)
    hits = np.zeros(len(pairs))
    truths = np.array([drawn_from.truth(*pair) for pair in pairs])
    for _ in range(STUDIES):
        found = compare(drawn_from.study(generator, prompts, seeds), pairs)
        hits += [found[pair].low <= truth <= found[pair].high for pair, truth in zip(pairs, truths, strict=True)]
    covered = {f"{job} − {other}": float(hit) for (job, other), hit in zip(pairs, hits / STUDIES, strict=True)}
    print(f"{compare.__name__}: {prompts} prompts, {seeds} seeds: {covered}")
    return covered


def _wrong_winners(compare: Compare, drawn_from: Population, pairs: list[Pair], prompts: int, seeds: int) -> float:
    """The share of a thousand studies of equal methods in which any pair has a better or a worse one."""
    generator = np.random.default_rng(2000 * prompts + seeds)
    equal, named = drawn_from.equal(), 0
    for _ in range(STUDIES):
        verdicts = judge(compare(equal.study(generator, prompts, seeds), pairs))
        named += any(verdict.outcome != "not decidable" for verdict in verdicts)
    print(f"{compare.__name__}: {prompts} prompts, {seeds} seeds: a winner in {named / STUDIES:.1%} of equal studies")
    return named / STUDIES


@pytest.mark.parametrize("prompts", [30, 100, 500])
def test_intervals_of_one_seed_have_the_truth_in_93_to_97_of_100_studies(prompts: int) -> None:
    covered = _coverage(_by_bootstrap, population(*ALL, one_seed=True), PAIRS, prompts, 1)
    assert all(0.93 <= share <= 0.97 for share in covered.values())


@pytest.mark.parametrize("prompts", [LEAST_PROMPTS, 20])
def test_intervals_of_few_prompts_have_the_truth_in_at_least_93_of_100_studies(prompts: int) -> None:
    covered = _coverage(_by_bootstrap, population(*ALL, one_seed=True), PAIRS, prompts, 1)
    assert all(share >= 0.93 for share in covered.values())


@pytest.mark.parametrize("apart", [0.3, 3.0])
@pytest.mark.parametrize("prompts", [LEAST_PROMPTS, 30, 200])
def test_intervals_of_three_seeds_have_the_truth_in_at_least_93_of_100_studies(prompts: int, apart: float) -> None:
    drawn_from = population("base", "combined", "fedavg").with_seeds_apart(apart)
    covered = _coverage(_by_bootstrap, drawn_from, PAIRS[-2:], prompts, 3)
    assert all(share >= 0.93 for share in covered.values())


@pytest.mark.parametrize("apart", [0.3, 3.0])
@pytest.mark.parametrize(("prompts", "seeds"), [(30, 6), (200, 6)])
def test_intervals_of_many_seeds_have_the_truth_in_93_to_97_of_100_studies(
    prompts: int, seeds: int, apart: float
) -> None:
    drawn_from = population("base", "combined", "fedavg").with_seeds_apart(apart)
    covered = _coverage(_by_bootstrap, drawn_from, PAIRS[-2:], prompts, seeds)
    assert all(0.93 <= share <= 0.97 for share in covered.values())


@pytest.mark.parametrize("prompts", [20, 60, 500])
def test_intervals_from_sums_have_the_truth_in_at_least_93_of_100_studies(prompts: int) -> None:
    covered = _coverage(_by_sums, population(*ALL, one_seed=True), PAIRS, prompts, 1)
    assert all(share >= 0.93 for share in covered.values())


@pytest.mark.parametrize("prompts", [LEAST_PROMPTS, 30, 200])
def test_equal_models_have_a_winner_in_at_most_5_of_100_studies(prompts: int) -> None:
    assert _wrong_winners(_by_bootstrap, population(*ALL, one_seed=True), PAIRS, prompts, 1) <= 0.05


@pytest.mark.parametrize("prompts", [30, 200])
def test_equal_methods_of_three_seeds_have_a_winner_in_at_most_5_of_100_studies(prompts: int) -> None:
    assert _wrong_winners(_by_bootstrap, population("base", "combined", "fedavg"), PAIRS[-2:], prompts, 3) <= 0.05


@pytest.mark.parametrize("prompts", [20, 200])
def test_equal_models_have_a_winner_by_sums_in_at_most_5_of_100_studies(prompts: int) -> None:
    assert _wrong_winners(_by_sums, population(*ALL, one_seed=True), PAIRS, prompts, 1) <= 0.05


def test_a_difference_as_large_as_the_detectable_one_is_found_four_times_in_five() -> None:
    drawn_from, pair, prompts = population("base", "combined", "fedavg", one_seed=True).equal(), PAIRS[-2], 200
    generator = np.random.default_rng(6)
    typical = [
        detectable(compare_pairs(drawn_from.study(generator, prompts, 1), [pair], resamples=100)[pair].parts, 0.05)
        for _ in range(200)
    ]
    losses = dict(drawn_from.losses)
    losses["fedavg"] = losses["fedavg"] - np.median(typical) * drawn_from.tokens
    lower = Population(drawn_from.tokens, losses)
    found = 0
    for _ in range(STUDIES):
        (verdict,) = judge(_by_bootstrap(lower.study(generator, prompts, 1), [pair]))
        found += verdict.outcome == "better"
    print(f"power at the detectable difference: {found / STUDIES:.1%}")
    assert 0.75 <= found / STUDIES <= 0.87
