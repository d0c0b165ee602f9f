"""Who is champion: better than the last one and the base model, beyond the interval, on the same records."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest

from fedsft_assets.evaluation.champion import CHAMPION, Decision, decide, without_champion

PROMPTS = 60


def _losses(means: Mapping[str, float], noise: float = 0.02, prompts: int = PROMPTS) -> pd.DataFrame:
    """Losses on records that are hard or easy for all models alike, each with some noise of its own."""
    hardness = np.random.default_rng(0).uniform(0.5, 1.5, prompts)
    names = [f"{number:016x}" for number in range(prompts)]
    tables = []
    for seed, (model, mean) in enumerate(means.items(), 1):
        own = np.random.default_rng(seed).normal(0, noise, prompts)
        loss = 20 * np.clip(mean * hardness + own - own.mean(), 0, None)
        rows = {"model": model, "seed": None, "dataset": "dolly", "record": names, "prompt": names, "first": True}
        tables.append(pd.DataFrame({**rows, "tokens": 20, "loss": loss}))
    return pd.concat(tables, ignore_index=True)


def _decide(means: Mapping[str, float], champion: str | None = None, **others: float) -> Decision:
    return decide(_losses(means, **others), {model: f"digest of {model}" for model in means}, champion)  # type: ignore[arg-type]


def test_first_champion_has_the_lowest_loss_of_those_better_than_the_base_model() -> None:
    made = _decide({"base_model": 3.0, "alpaca": 2.0, "fedavg": 1.0, "dolly": 3.0})
    assert (made.champion, made.challenger) == ("digest of fedavg", "digest of alpaca")
    assert made.reasons["digest of fedavg"].startswith("fedavg is better than the base model: test loss lower by 2.0")
    assert made.reasons["digest of alpaca"].startswith("fedavg has a lower test loss: 1.0")
    assert "not decidable" in made.reasons["digest of dolly"]


def test_nobody_is_champion_who_is_not_better_than_the_base_model() -> None:
    made = _decide({"base_model": 2.0, "alpaca": 2.0, "fedavg": 2.5})
    assert (made.champion, made.challenger) == (None, "digest of alpaca")
    assert made.reasons["digest of fedavg"].startswith("fedavg is worse than the base model")


@pytest.mark.parametrize(("noise", "moved"), [(0.01, True), (1.0, False)])
def test_champion_is_replaced_beyond_the_interval_only(noise: float, moved: bool) -> None:
    """The new one's mean is lower by 0.05 in both cases."""
    means = {"base_model": 9.0, CHAMPION: 2.0, "fedavg": 1.95}
    made = _decide(means, f"digest of {CHAMPION}", noise=noise)
    assert made.champion == ("digest of fedavg" if moved else f"digest of {CHAMPION}")
    assert made.challenger == (None if moved else "digest of fedavg")
    said = made.reasons["digest of fedavg"]
    assert ("fedavg is better than the champion" if moved else "fedavg and the champion: not decidable") in said
    assert made.reasons[f"digest of {CHAMPION}"].startswith("no longer" if moved else "stays the champion")


def test_a_job_that_is_better_than_the_champion_and_not_than_the_base_model_stays_a_challenger() -> None:
    made = _decide({"base_model": 1.0, CHAMPION: 3.0, "fedavg": 2.0}, f"digest of {CHAMPION}")
    assert (made.champion, made.challenger) == (f"digest of {CHAMPION}", "digest of fedavg")
    assert made.reasons["digest of fedavg"].startswith("fedavg is worse than the base model")


def test_a_job_with_the_champions_weights_is_the_champion_and_no_rival() -> None:
    made = _decide({"base_model": 3.0, "alpaca": 2.0, "fedavg": 1.0}, "digest of fedavg")
    assert (made.champion, made.challenger) == ("digest of fedavg", "digest of alpaca")
    assert made.reasons["digest of fedavg"].startswith("stays the champion")
    assert "alpaca is worse than fedavg" in made.reasons["digest of alpaca"]
    assert "- fedavg (champion): stays the champion" in made.markdown()


def test_too_few_prompts_decide_nothing() -> None:
    assert _decide({"base_model": 9.0, "fedavg": 1.0}, prompts=5).champion is None


def test_models_are_judged_on_the_records_that_all_were_scored_on() -> None:
    """On its own half alone, alpaca would win."""
    losses = _losses({"base_model": 3.0, "alpaca": 1.9, "fedavg": 1.5})
    half = losses["record"].isin(losses["record"].unique()[: PROMPTS // 2])
    losses = losses[half | (losses["model"] != "alpaca")]
    losses.loc[(losses["model"] == "fedavg") & ~half, "loss"] *= 10
    made = decide(losses, {model: model for model in ("base_model", "alpaca", "fedavg")}, None)
    assert made.champion == "fedavg"


def test_champion_that_cannot_be_scored_stays() -> None:
    made = without_champion(_decide({"base_model": 3.0, "alpaca": 2.0, "fedavg": 1.0}), "another", "version 3, gone")
    assert (made.champion, made.challenger) == ("another", "digest of fedavg")
    assert made.reasons["digest of fedavg"].startswith(
        "not compared with the champion, version 3, gone; fedavg is better"
    )
