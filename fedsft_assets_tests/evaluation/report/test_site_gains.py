"""What sites gain of a federated model."""

from pathlib import Path

import pandas as pd
import pytest

from fedsft_assets.evaluation.record_scores import LOSSES_FILE
from fedsft_assets.evaluation.report.site_gains import gain_sentences, gains_table
from fedsft_assets.evaluation.report.study import Study
from fedsft_assets_tests.evaluation.studies import REPORTS, TEST_LOSSES, evaluation, study


@pytest.fixture
def found(tmp_path: Path) -> Study:
    """Of fedavg on alpaca and dolly; on alpaca the base model's losses are doubled, and only alpaca has a local job."""
    folders = {model: evaluation(tmp_path / model, model, loss) for model, loss in TEST_LOSSES.items()}
    table = pd.read_parquet(folders["base_model"] / LOSSES_FILE)
    table.loc[table["dataset"] == "alpaca", "loss"] *= 2
    table.to_parquet(folders["base_model"] / LOSSES_FILE)
    return study(REPORTS[:1] + REPORTS[3:], [folders[model] for model in ("base_model", "fedavg", "alpaca")])


def test_gain_is_the_difference_in_the_matrix_on_the_sites_own_dataset(found: Study) -> None:
    matrix = found.comparison.matrix
    alpaca, dolly = found.gains
    assert [(gain.site, gain.dataset, gain.local_job) for gain in found.gains] == [
        ("site-1", "alpaca", "alpaca"),
        ("site-2", "dolly", None),
    ]
    assert alpaca.over_local is not None
    assert alpaca.over_local.value == pytest.approx(matrix.loc["alpaca", "alpaca"] - matrix.loc["fedavg", "alpaca"])
    assert dolly.over_base.value == pytest.approx(matrix.loc["base_model", "dolly"] - matrix.loc["fedavg", "dolly"])
    for gain in (alpaca.over_local, alpaca.over_base, dolly.over_base):
        assert gain.low < gain.value < gain.high


def test_worst_site_and_spread_are_over_the_same_model_at_all_sites(found: Study) -> None:
    (sentence,) = gain_sentences(found.gains)
    gains = [gain.over_base.value for gain in found.gains]
    assert sentence.startswith("fedavg: worst site site-2 (dolly), with a gain of +")
    assert "over the base model" in sentence
    assert sentence.endswith(f"spread over 2 sites: {max(gains) - min(gains):.3f}")


def test_table_says_where_there_is_no_local_job(found: Study) -> None:
    rows = gains_table(found.gains).splitlines()
    assert "no local job" not in rows[2]
    assert "no local job" in rows[3]
