"""The table and the plot over all jobs, and jobs that cannot be compared."""

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from fedsft_assets.evaluation.comparison import NotComparableError, compare
from fedsft_assets.evaluation.record_scores import LOSSES_FILE
from fedsft_assets.model.perplexity import perplexity
from fedsft_assets_tests.evaluation.studies import REPORTS, TEST_LOSSES, evaluation


@pytest.fixture
def evaluations(tmp_path: Path) -> list[Path]:
    """Of the base model and of all jobs, on records of two datasets."""
    return [evaluation(tmp_path / "evaluations" / model, model, loss) for model, loss in TEST_LOSSES.items()]


def _cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_jobs_are_ordered_local_centralized_federated_each_by_name(evaluations: list[Path]) -> None:
    result = compare(REPORTS, evaluations)
    assert [report.job for report in result.reports] == ["alpaca", "oasst1", "combined", "fedavg"]


def test_table_has_a_line_for_the_base_model_and_for_each_job(evaluations: list[Path]) -> None:
    header, _, base, *jobs = _cells(compare(REPORTS, evaluations).markdown().split("\n\n")[1])
    assert header == [
        "job",
        "kind",
        "rounds",
        "tokens trained",
        "val loss, best",
        "best round",
        "test loss",
        "95 % interval",
        "perplexity",
        "seconds",
    ]
    assert [cell for cell in base if " to " not in cell] == [
        "base model",
        "",
        "",
        "",
        "7.0000",
        "",
        "7.2500",
        "1408.105",
        "",
    ]
    assert [row[0] for row in jobs] == ["alpaca", "oasst1", "combined", "fedavg"]
    low, high = map(float, jobs[-1].pop(7).split(" to "))
    assert 0.9 < low < 1.0 < high < 1.1
    assert jobs[-1] == [
        "fedavg",
        "federated",
        "3",
        "12,345,678",
        "0.9000",
        "2",
        "1.0000",
        "2.718",
        "62",
    ]


def test_verdicts_come_first_in_words_and_then_what_differs_in_budgets(evaluations: list[Path]) -> None:
    small = replace(REPORTS[1], tokens=1_000_000)
    said = compare([REPORTS[0], small, *REPORTS[2:]], evaluations).markdown().split("\n\n")[0].splitlines()
    assert [line.partition(":")[0] for line in said] == [
        "- fedavg is better than alpaca",
        "- fedavg is better than oasst1",
        "- fedavg is worse than combined",
        "- fedavg is better than the base model",
        "- fedavg trained on 1135 % more answer tokens than combined (12,345,678 and 1,000,000)",
        "- a local job trains on its site's data alone",
    ]


def test_costs_are_in_tables_of_their_own_and_said_where_they_differ(evaluations: list[Path]) -> None:
    traffic = {"site-1": {"sent": 30_000_000, "received": 40_000_000}, "site-2": {"sent": 0, "received": 5_000_000}}
    costs = {"steps": 200, "cpu_seconds": 50.0, "peak_memory": 700_000_000, "traffic": traffic}
    federated = replace(REPORTS[0], **costs)
    other = replace(
        REPORTS[1], **{**costs, "steps": 400, "cpu_seconds": 51.0, "traffic": {"site-1": traffic["site-1"]}}
    )
    result = compare([federated, other, *REPORTS[2:]], evaluations)
    assert result.sentences[-1] == (
        "the jobs over all data also differ in optimizer steps (200 of fedavg to 400 of combined), MB sent to sites"
        " (40.0 of combined to 45.0 of fedavg)"
    )
    *_, title, budgets, sites = result.markdown().split("\n\n")
    assert title == "What each job cost:"
    rows = _cells(budgets)
    assert rows[0][4:7] + rows[0][-2:] == ["MB up", "MB down", "seconds", "CPU seconds", "peak memory, MB"]
    assert rows[2] == ["alpaca", "2", "unknown", "12,345,678", "unknown", "unknown", "62", "unknown", "unknown"]
    assert rows[-1] == ["fedavg", "3", "200", "12,345,678", "30.0", "45.0", "62", "50", "700.0"]
    assert _cells(sites)[2:] == [
        ["combined", "site-1", "30.0", "40.0"],
        ["fedavg", "site-1", "30.0", "40.0"],
        ["fedavg", "site-2", "0.0", "5.0"],
    ]


def test_study_without_a_federated_job_has_no_verdict(evaluations: list[Path]) -> None:
    assert compare(REPORTS[1:], [folder for folder in evaluations if folder.name != "fedavg"]).sentences == []


def test_interval_of_a_single_record_is_unknown(evaluations: list[Path]) -> None:
    for folder in evaluations:
        pd.read_parquet(folder / LOSSES_FILE).head(1).to_parquet(folder / LOSSES_FILE)
    result = compare(REPORTS, evaluations)
    assert {row[7] for row in _cells(result.markdown().split("\n\n")[1])[2:]} == {"unknown"}
    assert all("not decidable with these data" in verdict.sentence for verdict in result.verdicts)


def test_second_table_has_the_loss_of_each_model_on_each_dataset(evaluations: list[Path]) -> None:
    header, _, *rows = _cells(compare(REPORTS, evaluations).markdown().split("\n\n")[2])
    assert header == ["test loss on", "combined", "alpaca", "dolly"]
    assert rows[0][:2] == ["base model", "7.2500"]
    assert [row[0] for row in rows[1:]] == ["alpaca", "oasst1", "combined", "fedavg"]


def test_jobs_from_different_base_models_are_not_compared(evaluations: list[Path]) -> None:
    odd = replace(REPORTS[2], base_model_digest="0123456789abcdef")
    with pytest.raises(NotComparableError) as error:
        compare([*REPORTS[:2], odd], evaluations)
    assert "more than one base model" in str(error.value)
    assert "oasst1: 0123456789ab" in str(error.value)
    assert "materialize their checkpoints again" in str(error.value)


def test_jobs_beside_different_validation_splits_are_compared_by_test_loss(evaluations: list[Path]) -> None:
    odd = replace(REPORTS[2], validation_digest="0123456789abcdef", val_loss=[7.5, 6.5])
    _, jobs, note, *_ = compare([*REPORTS[:2], odd], evaluations).markdown().split("\n\n")
    assert note.startswith("Validation losses are over 2 validation splits, as data has changed between the jobs")
    assert _cells(jobs)[2][:7] == ["base model", "", "", "", "", "", "7.2500"]


def test_models_that_were_evaluated_on_different_records_are_not_compared(
    tmp_path: Path, evaluations: list[Path]
) -> None:
    odd = evaluation(tmp_path / "odd", "fedavg", 1.0, testing_split="0123456789abcdef")
    others = [folder for folder in evaluations if folder.name != "fedavg"]
    with pytest.raises(NotComparableError, match=r"more than one testing split .*fedavg: 0123456789ab.*evaluations"):
        compare(REPORTS, [*others, odd])


def test_job_with_several_seeds_has_one_line_of_means(evaluations: list[Path], tmp_path: Path) -> None:
    others = [
        evaluation(tmp_path / "second" / model, model, loss + 0.1, seed=1235)
        for model, loss in TEST_LOSSES.items()
        if model != "base_model"
    ]
    second = [replace(report, seed=1235, val_loss=[loss + 0.2 for loss in report.val_loss]) for report in REPORTS]
    result = compare([*REPORTS, *second], [*evaluations, *others])
    header, _, _, *jobs = _cells(result.markdown().split("\n\n")[1])
    fedavg = dict(zip(header, jobs[-1], strict=True))
    assert [row[0] for row in jobs] == ["alpaca", "oasst1", "combined", "fedavg"]
    assert fedavg["test loss"] == "1.0500"
    assert fedavg["val loss, best"] == "1.0000"
    assert fedavg["best round"] == "2, 2"
    assert float(fedavg["deviation over seeds"]) == pytest.approx(0.1 / 2**0.5, abs=1e-4)
    assert "Every job was trained with the seeds 1234, 1235; values are means over them." in result.markdown()
    assert result.matrix.loc["fedavg", "combined"] == pytest.approx(1.05)
    assert all("2 seeds" in sentence for sentence in result.sentences[:4])


def test_evaluation_of_another_seed_is_not_taken_for_this_one(evaluations: list[Path], tmp_path: Path) -> None:
    second = [replace(report, seed=1235, checkpoint_digest=f"{report.job} again") for report in REPORTS]
    others = [evaluation(tmp_path / "second" / report.job, report.job, 1.0, seed=1235) for report in REPORTS]
    with pytest.raises(NotComparableError, match="the evaluations of fedavg, combined, oasst1, alpaca are of other"):
        compare([*REPORTS, *second], [*evaluations, *others])


def test_evaluation_of_another_checkpoint_is_not_taken_for_the_jobs_own(evaluations: list[Path]) -> None:
    trained_again = replace(REPORTS[0], checkpoint_digest="another")
    with pytest.raises(NotComparableError, match="the evaluations of fedavg are of other checkpoints; materialize"):
        compare([trained_again, *REPORTS[1:]], evaluations)


@pytest.mark.parametrize(("loss", "expected"), [(0.0, 1.0), (709.9, math.inf), (1e308, math.inf)])
def test_perplexity_of_any_loss_is_a_number(loss: float, expected: float) -> None:
    assert perplexity(loss) == expected
