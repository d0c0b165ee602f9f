"""Points of curves: what tells them apart, when they were measured, and the way they travel."""

import time
from dataclasses import replace

import pytest

from fedsft_assets.federation.protocol.points import Point, points_to_data

POINTS = [
    Point("val_loss", 7.178342342, 0, 0),
    Point("train_loss", 1e-9, 3, 480, "site-1", 7, 1234),
    Point("val_loss_local", float("inf"), 3, 480, "site-é"),
]


def test_points_travel_as_plain_values_that_do_not_say_whose_they_are() -> None:
    data = points_to_data(POINTS)
    assert all(isinstance(value, str | int | float | None) for point in data for value in point.values())
    assert all("site" not in point for point in data)
    assert [Point(**one, site=point.site) for one, point in zip(data, POINTS, strict=True)] == POINTS
    assert [one["time"] for one in data] == [point.time for point in POINTS]


def test_point_knows_when_it_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1234.56789)
    assert Point("val_loss", 1.0, 0, 0).time == 1234.568


def test_points_that_differ_in_time_alone_are_equal() -> None:
    assert replace(POINTS[0], time=1.0) == replace(POINTS[0], time=2.0)


def test_point_of_a_round_that_is_done_twice_is_the_same_one() -> None:
    again = replace(POINTS[1], value=0.5, samples=512, tokens=99, time=1.0)
    assert again != POINTS[1]
    assert again.identity == POINTS[1].identity


@pytest.mark.parametrize("other", [{"name": "val_loss"}, {"site": "site-2"}, {"site": None}, {"round": 4}, {"step": 8}])
def test_points_of_another_name_site_round_or_step_are_others(other: dict[str, object]) -> None:
    assert replace(POINTS[1], **other).identity != POINTS[1].identity  # type: ignore[arg-type]
