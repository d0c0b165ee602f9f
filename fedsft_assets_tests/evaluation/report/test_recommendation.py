"""What a study recommends, in words, for each outcome."""

from pathlib import Path

import pandas as pd
import pytest

from fedsft_assets.evaluation.record_scores import LOSSES_FILE
from fedsft_assets.evaluation.report.recommendation import Recommendation
from fedsft_assets.specs.job import BASE_MODEL
from fedsft_assets_tests.evaluation.studies import REPORTS, evaluation, study

BETTER = {BASE_MODEL: 7.25, "fedavg": 1.0, "combined": 0.9, "oasst1": 6.4, "alpaca": 6.2}


def _recommended(folder: Path, jobs: list[str] | None = None, **losses: float) -> Recommendation:
    reports = [report for report in REPORTS if jobs is None or report.job in jobs]
    models = {BASE_MODEL, *(report.job for report in reports)}
    folders = [
        evaluation(folder / model, model, loss) for model, loss in {**BETTER, **losses}.items() if model in models
    ]
    return study(reports, folders).recommendation


def test_federated_model_that_beats_all_but_the_bound_is_recommended(tmp_path: Path) -> None:
    found = _recommended(tmp_path)
    assert (found.job, found.headline) == ("fedavg", "Use fedavg, a federated model")
    over, bound = found.reasons
    assert "measurably better than the base model (loss 1.000 instead of 7.250; lower is better)" in over
    assert "and than each of the 2 sites' own models (the nearest, alpaca: 6.200)" in over
    assert bound.startswith("Training on all data in one place (combined) gives 0.900, measurably better")


def test_model_of_a_site_that_may_be_as_good_is_named(tmp_path: Path) -> None:
    found = _recommended(tmp_path, alpaca=1.0)
    assert found.job == "fedavg"
    assert "whether also better than alpaca, trained at one site, these data cannot tell" in found.reasons[0]


def test_site_whose_own_model_is_better_on_its_own_data_is_named(tmp_path: Path) -> None:
    folders = [evaluation(tmp_path / model, model, loss) for model, loss in BETTER.items()]
    file = tmp_path / "alpaca" / LOSSES_FILE
    table = pd.read_parquet(file)
    table.loc[table["dataset"] == "alpaca", "loss"] /= 50
    table.to_parquet(file)
    found = study(REPORTS, folders).recommendation
    assert found.job == "fedavg"
    said = "At site-1, the site's own model is still measurably better on questions like its own"
    assert found.reasons[1:] == [said]


@pytest.mark.parametrize(
    ("losses", "job", "reason"),
    [
        ({"alpaca": 0.5}, "alpaca", "training together has not paid off yet"),
        ({"fedavg": 8.0, "alpaca": 9.0, "oasst1": 9.0}, None, "training has made the model worse"),
        ({"fedavg": 8.0, "alpaca": 7.5, "oasst1": 9.0}, None, "training has made the model worse"),
    ],
)
def test_another_model_is_recommended_if_the_federated_one_is_beaten(
    tmp_path: Path, losses: dict[str, float], job: str | None, reason: str
) -> None:
    found = _recommended(tmp_path, **losses)
    assert found.job == job
    assert reason in found.reasons[0]


def test_study_without_federated_jobs_says_that_nothing_is_tested(tmp_path: Path) -> None:
    found = _recommended(tmp_path, ["alpaca", "combined"])
    assert (found.job, found.headline) == ("combined", "Use combined, a centralized model")
    assert "no difference between models is tested" in found.reasons[0]


def test_study_of_a_federated_job_alone_says_what_is_unknown(tmp_path: Path) -> None:
    found = _recommended(tmp_path, ["fedavg"])
    assert found.job == "fedavg"
    assert found.reasons[0].endswith("what a site gains by taking part is not known")
    assert len(found.reasons) == 1
