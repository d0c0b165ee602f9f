"""What the judge of a campaign finds: a bit of a weight, a point that is lost, doubled or another's."""

from dataclasses import replace

import pytest
import torch

from fedsft_assets.federation.protocol.points import Point
from fedsft_assets.federation.server.curves import merged_val_loss
from fedsft_assets.specs.job import JobSpec, SiteSpec
from fedsft_assets_tests.faults.comparison import Result, differences

_SITES = ("site-1", "site-2", "site-3")


def _result(scorers: tuple[str, ...] = _SITES) -> Result:
    """Of one round, whose model was scored by these sites."""
    first = [Point("val_loss", 4.0 + number / 7, 0, 0, site, tokens=40) for number, site in enumerate(_SITES)]
    last = [Point("val_loss", 3.0 + number**2 / 7, 1, 32, site, tokens=40) for number, site in enumerate(_SITES)]
    steps = [Point("train_loss", 2.5, 1, 16, "site-1", step=1, tokens=100)]
    scores = [merged_val_loss([point for point in last if point.site in scorers], 1, 96), merged_val_loss(first, 0, 0)]
    report = {"val_loss": [scores[1].value, scores[0].value], "test_loss": 3.25, "missed": {}}
    return Result({"w": torch.tensor([1.0, 2.0])}, [*first, *last, *steps, *scores], report)


def test_nothing_differs_from_the_same() -> None:
    assert differences(_result(), _result()) == []


def test_one_bit_of_a_weight_is_seen() -> None:
    found = replace(
        _result(), weights={"w": torch.tensor([1.0, torch.nextafter(torch.tensor(2.0), torch.tensor(3.0))])}
    )
    assert differences(_result(), found) == ["weights differ by up to 2.38e-07"]


def test_a_loss_of_the_report_is_compared() -> None:
    found = _result()
    found.report["test_loss"] = 3.2500000001
    assert differences(_result(), found) == ["test_loss: 3.2500000001 instead of 3.25"]


def test_points_that_are_lost_doubled_or_of_nothing_are_named() -> None:
    found = _result()
    step = next(point for point in found.points if point.name == "train_loss")
    others = [point for point in found.points if point is not step]
    assert differences(_result(), replace(found, points=others)) == [
        "1 points are missing: [\"('train_loss', 'site-1', 1, 1)\"]"
    ]
    assert differences(_result(), replace(found, points=[*found.points, step])) == [
        "points are there twice: [('train_loss', 'site-1', 1, 1)]"
    ]
    assert differences(_result(), replace(found, points=[*found.points, replace(step, step=2)])) == [
        "1 points of nothing: [\"('train_loss', 'site-1', 1, 2)\"]"
    ]


def test_a_value_of_another_history_is_told_with_both() -> None:
    found = _result()
    points = [replace(point, value=2.5001) if point.name == "train_loss" else point for point in found.points]
    (said,) = differences(_result(), replace(found, points=points))
    assert "value=2.5001" in said
    assert "value=2.5," in said


def test_what_a_site_told_before_it_missed_the_round_may_be_there() -> None:
    told = Point("train_loss", 2.25, 1, 16, "site-2", step=1, tokens=90)
    found = replace(_result(), points=[*_result().points, told])
    assert differences(replace(_result(), told=[told]), found) == []
    assert differences(replace(_result(), told=[replace(told, value=2.3)]), found) != []


@pytest.mark.parametrize("scorers", [_SITES, ("site-1", "site-3"), ("site-1", "site-2")])
def test_who_missed_the_last_score_is_known_by_the_score(scorers: tuple[str, ...]) -> None:
    spec = JobSpec(
        name="small",
        description="",
        sites={site: SiteSpec(dataset="alpaca") for site in _SITES},
        rounds=1,
        min_sites=2,
    )
    assert _result(scorers).missed(spec) == {site: [2] for site in _SITES if site not in scorers}
