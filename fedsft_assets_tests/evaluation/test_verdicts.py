"""What a testing split can show, and the sentence for each pair of jobs."""

from dataclasses import replace

import numpy as np
import pytest

from fedsft_assets.evaluation.statistics.intervals import Estimate, compare_pairs
from fedsft_assets.evaluation.statistics.moment_intervals import compare_pairs_by_moments
from fedsft_assets.evaluation.statistics.moments import moments
from fedsft_assets.evaluation.statistics.power import Needed, detectable, needed
from fedsft_assets.evaluation.statistics.variance import Parts, SeedPart
from fedsft_assets.evaluation.statistics.verdicts import LEAST_PROMPTS, holm, judge, pairs_that_matter, unequal_budgets
from fedsft_assets_tests.evaluation.simulated_studies import ONE_SEED, PAIRS, real_scores

# Power


def test_the_detectable_difference_is_millers_for_many_prompts_and_counts_prompts_by_their_square_root() -> None:
    parts = Parts(0.0, prompts=0.04, seeds=(), clusters=100_000, effective_clusters=9e4)
    assert detectable(parts, 0.05) == pytest.approx((1.959964 + 0.841621) * 0.2, rel=1e-4)
    assert detectable(replace(parts, prompts=0.01), 0.05) == pytest.approx(detectable(parts, 0.05) / 2)


def test_the_records_needed_make_the_difference_that_was_seen_detectable() -> None:
    seen = Parts(0.01, prompts=0.0004, seeds=(), clusters=500, effective_clusters=400.0)
    takes = needed(seen, 1000, 0.05).records
    assert takes is not None
    times = takes / 1000
    then = replace(seen, prompts=seen.prompts / times, clusters=round(500 * times), effective_clusters=400 * times)
    assert detectable(then, 0.05) == pytest.approx(0.01, rel=0.002)
    assert needed(replace(seen, value=0.0), 1000, 0.05) == Needed(None, None)
    assert needed(replace(seen, value=1e-6), 1000, 0.05).records is None


def test_where_seeds_are_the_doubt_more_seeds_are_asked_for_and_not_more_records() -> None:
    seen = Parts(0.05, 1e-5, (SeedPart(0.001, 3, 0.0),), clusters=500, effective_clusters=400.0)
    takes = needed(seen, 1000, 0.05)
    assert takes.records is None
    assert takes.seeds is not None
    assert 8 < takes.seeds < 20
    mostly_shared = replace(seen, seeds=(SeedPart(0.001, 3, 0.001),))
    assert needed(mostly_shared, 1000, 0.05).records is not None


# Verdicts


def _estimate(value: float, half: float, p_value: float, **changes: object) -> Estimate:
    error = half / 1.96
    parts = Parts(value, error**2, (), clusters=300, effective_clusters=250.0)
    return replace(Estimate(value, value - half, value + half, p_value, parts, 412, (0, 0)), **changes)


def test_p_values_are_corrected_as_by_holm() -> None:
    """R: p.adjust(c(0.04, 0.01, 0.03, 0.005, 0.9), "holm")."""
    assert holm([0.04, 0.01, 0.03, 0.005, 0.9]) == pytest.approx([0.09, 0.04, 0.09, 0.025, 0.9])
    assert holm([0.4, 0.5]) == pytest.approx([0.8, 0.8])
    assert holm([]) == []


def test_a_clear_difference_is_a_sentence_with_its_interval_and_records() -> None:
    (better,) = judge({("fedavg", "alpaca"): _estimate(-3.12, 0.25, 0.001)})
    assert better.outcome == "better"
    assert better.sentence == (
        "fedavg is better than alpaca: test loss lower by 3.12 nats a token (95 % interval 2.87 to 3.37; 412 records)"
    )
    (worse,) = judge({("fedavg", "combined"): _estimate(0.0312, 0.0025, 0.001, seeds=(3, 3))})
    assert worse.sentence == (
        "fedavg is worse than combined: test loss higher by 0.0312 nats a token"
        " (95 % interval 0.0287 to 0.0337; 412 records, 3 seeds)"
    )


def test_an_unclear_difference_says_how_many_records_it_would_take() -> None:
    (verdict,) = judge({("fedavg", "combined"): _estimate(0.012, 0.042, 0.6)})
    assert verdict.outcome == "not decidable"
    assert verdict.sentence == (
        "fedavg and combined: not decidable with these data: the difference is 0.012 nats a token"
        " (95 % interval −0.030 to 0.054; 412 records); it would take about 11,000 records"
    )
    assert verdict.detectable == pytest.approx(0.060, abs=0.001)


def test_a_job_with_one_seed_and_jobs_with_unequal_seeds_are_said_to_be_so() -> None:
    pairs = {
        ("fedavg", "alpaca"): _estimate(-3.12, 0.25, 0.001, seeds=(1, 1)),
        ("fedavg", "base"): _estimate(-3.12, 0.25, 0.001, seeds=(3, 0)),
        ("fedavg", "dolly"): _estimate(-3.12, 0.25, 0.001, seeds=(3, 1)),
    }
    one, untrained, unequal = (verdict.sentence for verdict in judge(pairs))
    assert "412 records; one seed, so another training may differ)" in one
    assert "412 records, 3 seeds)" in untrained
    assert "412 records; seeds: 3 of fedavg and 1 of dolly)" in unequal


def test_a_difference_that_only_one_pair_alone_would_show_is_no_verdict_among_many() -> None:
    clear = {("fedavg", f"job-{index}"): _estimate(0.01, 0.02, 0.5) for index in range(4)}
    verdicts = judge({("fedavg", "alpaca"): _estimate(-0.05, 0.045, 0.03), **clear})
    assert verdicts[0].outcome == "not decidable"
    assert "that leaves out 0, but 5 pairs are judged at once" in verdicts[0].sentence
    (alone,) = judge({("fedavg", "alpaca"): _estimate(-0.05, 0.045, 0.03)})
    assert alone.outcome == "better"


def test_too_few_prompts_decide_nothing_however_clear_they_look() -> None:
    scores = real_scores(LEAST_PROMPTS - 1, columns=ONE_SEED)
    losses = scores.losses.copy()
    losses[[model.job for model in scores.models].index("fedavg")] /= 100
    (verdict,) = judge(compare_pairs(replace(scores, losses=losses), [("fedavg", "base")]))
    assert verdict.outcome == "not decidable"
    assert f"{LEAST_PROMPTS - 1} prompts are too few for an interval" in verdict.sentence
    assert judge(compare_pairs(scores, [("fedavg", "base")]))[0].outcome == "not decidable"


def test_where_one_prompt_has_nearly_all_tokens_nothing_is_decided() -> None:
    scores = real_scores(40, columns=ONE_SEED)
    times = np.where(np.arange(40) == 7, 1000.0, 1.0)
    scores = replace(scores, tokens=scores.tokens * times, losses=scores.losses * times)
    (verdict,) = judge(compare_pairs(scores, [("fedavg", "base")]))
    assert verdict.outcome == "not decidable"
    assert "a few of the 40 prompts have most of the answer tokens" in verdict.sentence


def test_one_prompt_alone_has_a_verdict_too() -> None:
    (verdict,) = judge(compare_pairs(real_scores(1, columns=ONE_SEED), [("fedavg", "base")]))
    assert "1 prompts are too few" in verdict.sentence


@pytest.mark.parametrize("by_sums", [False, True])
def test_two_jobs_with_the_same_losses_are_said_to_be_the_same(by_sums: bool) -> None:
    scores = real_scores(columns=["base", "fedavg/1"])
    scores = replace(scores, losses=np.stack([scores.losses[0]] * 2))
    pairs = [("fedavg", "base")]
    (verdict,) = judge(compare_pairs_by_moments(moments(scores), pairs) if by_sums else compare_pairs(scores, pairs))
    assert verdict.outcome == "not decidable"
    assert verdict.sentence.endswith("both have the same loss on all 580 records")
    assert (verdict.estimate.low, verdict.estimate.high, verdict.estimate.p_value) == (0, 0, 1)


def test_real_evaluations_get_the_verdict_that_their_training_suggests() -> None:
    verdicts = {verdict.other: verdict for verdict in judge(compare_pairs(real_scores(), PAIRS))}
    assert {other: verdicts[other].outcome for other in ("base", "dolly")} == {"base": "better", "dolly": "better"}


def test_federated_jobs_are_compared_with_each_local_one_the_centralized_and_the_base() -> None:
    kinds = {
        "fedprox": "federated",
        "combined": "centralized",
        "dolly": "local",
        "alpaca": "local",
        "fedavg": "federated",
    }
    assert pairs_that_matter(kinds, "base") == [  # type: ignore[arg-type]
        (job, other) for job in ("fedavg", "fedprox") for other in ("alpaca", "dolly", "combined", "base")
    ]


def test_budgets_that_differ_by_more_than_a_twentieth_are_said() -> None:
    tokens = {"fedavg": 1_000_000, "alpaca": 1_049_000, "dolly": 1_120_000, "combined": 0}
    pairs = [("fedavg", other) for other in ("alpaca", "dolly", "base")]
    assert unequal_budgets(tokens, pairs) == [
        "dolly trained on 12 % more answer tokens than fedavg (1,120,000 and 1,000,000):"
        " their difference is also one of budgets"
    ]
    assert len(unequal_budgets(tokens, [("fedavg", "combined")])) == 1
