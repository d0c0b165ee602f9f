"""The report of a finished job, and the curve of the global model behind it."""

from dataclasses import replace
from pathlib import Path

import pytest

from fedsft_assets.federation.protocol.job_report import REPORT_FILE, Curve, JobReport, global_curve
from fedsft_assets.federation.protocol.points import Point
from fedsft_assets.specs.job import JobSpec, SiteSpec

SPEC = JobSpec(name="fedavg", description="", rounds=2, sites={"site-1": SiteSpec(dataset="alpaca")})
POINTS = [
    Point("val_loss", 7.0, 0, 0),
    Point("val_loss", 9.0, 0, 0, "site-1"),
    Point("train_loss", 3.0, 1, 16, None, 1, 100),
    Point("train_loss", 3.5, 1, 16, "site-1", 1, 100),
    Point("val_loss", 2.0, 1, 16),
    Point("train_loss", 1.0, 2, 32, None, 1, 50),
    Point("val_loss_local", 0.5, 2, 32, "site-1"),
    Point("val_loss", 2.5, 2, 32),
]
REPORT = JobReport(
    job="fedavg",
    kind="local",
    rounds=2,
    best_round=1,
    tokens=150,
    samples=[0, 16, 32],
    val_loss=[7.0, 2.0, 2.5],
    test_loss=2.1,
    perplexity=8.166,
    seconds=1.5,
    phases={"train": 1.0},
    checkpoint_digest="c",
    base_model_digest="b",
    validation_digest="v",
    runtime="poc",
    job_id="7",
    status="FINISHED:COMPLETED",
    missed={"site-1": [2]},
    seed=1234,
    steps=2,
    traffic={"site-1": {"sent": 8_000_000, "received": 12_000_000}, "site-2": {"sent": 1, "received": 2}},
    cpu_seconds=2.5,
    peak_memory=700_000_000,
    elapsed=[0.5, 1.0, 1.25],
    transferred=[4_000_002, 12_000_003, 20_000_003],
)


def test_curve_is_that_of_the_global_model_with_the_tokens_of_all_sites() -> None:
    curve = global_curve(POINTS, SPEC)
    assert curve == Curve([0, 16, 32], [7.0, 2.0, 2.5], tokens=150)
    assert curve.times == [point.time for point in POINTS if point.name == "val_loss" and not point.site]


def test_curve_does_not_depend_on_the_order_of_points() -> None:
    assert global_curve(POINTS[::-1], SPEC) == global_curve(POINTS, SPEC)


@pytest.mark.parametrize(("losses", "best"), [([7.0, 2.0, 2.5], 1), ([7.0, 3.0, 2.5], 2), ([1.0, 3.0, 2.0], 2)])
def test_best_round_is_never_the_base_model(losses: list[float], best: int) -> None:
    assert Curve([0, 16, 32], losses, tokens=1).best_round == best


def test_earlier_round_is_best_when_losses_are_equal() -> None:
    assert Curve([0, 16, 32], [7.0, 2.0, 2.0], tokens=1).best_round == 1


def test_job_that_ended_early_is_an_error_that_names_the_missing_rounds() -> None:
    with pytest.raises(ValueError, match=r"job fedavg: no val_loss after rounds \[1, 2\]; it ended before its 2"):
        global_curve(POINTS[:4], SPEC)


def test_losses_of_single_sites_do_not_stand_in_for_a_round() -> None:
    points = [replace(point, site="site-1") if point.round == 2 else point for point in POINTS]
    with pytest.raises(ValueError, match=r"no val_loss after rounds \[2\]"):
        global_curve(points, SPEC)


def test_report_is_the_same_after_a_trip_through_its_file(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    REPORT.write(folder)
    assert JobReport.read(folder) == REPORT
    assert [path.name for path in folder.iterdir()] == [REPORT_FILE]


def test_report_knows_base_best_and_last() -> None:
    assert (REPORT.base_val_loss, REPORT.best_val_loss, REPORT.last_val_loss) == (7.0, 2.0, 2.5)


def test_report_knows_what_all_sites_sent_and_received() -> None:
    assert (REPORT.sent, REPORT.received) == (8_000_001, 12_000_002)
    unknown = replace(REPORT, traffic=None)
    assert (unknown.sent, unknown.received) == (None, None)
