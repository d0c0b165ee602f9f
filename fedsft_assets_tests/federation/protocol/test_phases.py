"""Seconds by phase: how a site counts them, what they are called, and what a job makes of those of its sites."""

import pytest

from fedsft_assets.federation.protocol.phases import PhaseClock, longest_phases, metric_name, phase_of
from fedsft_assets.federation.protocol.points import Point


def test_seconds_of_a_phase_add_up_over_rounds_also_when_it_fails() -> None:
    clock = PhaseClock()
    clock.add("train", 1.25)
    clock.add("validate", 0.5)
    clock.add("train", 2.0)
    with pytest.raises(ValueError, match="no record"), clock.phase("tokenize"):
        raise ValueError("no record")
    *measured, tokenize = clock.points(round=3, samples=96, site="site-1")
    assert measured == [
        Point("system/train_seconds", 3.25, 3, 96, "site-1", time=measured[0].time),
        Point("system/validate_seconds", 0.5, 3, 96, "site-1", time=measured[1].time),
    ]
    assert tokenize.name == "system/tokenize_seconds"


def test_phase_of_a_job_takes_as_long_as_at_its_slowest_site_in_the_end() -> None:
    points = [
        Point(metric_name("train"), 1.0, 1, 32, "site-1"),
        Point(metric_name("train"), 2.0, 2, 64, "site-1"),
        Point(metric_name("train"), 3.0, 1, 32, "site-2"),
        Point(metric_name("transfer"), 0.5, 1, 32, "site-1"),
        Point("val_loss", 7.0, 1, 32, "site-1"),
    ]
    assert longest_phases(points) == {"train": 3.0, "transfer": 0.5}


def test_only_seconds_of_a_phase_are_taken_for_them() -> None:
    assert phase_of(metric_name("load")) == "load"
    assert phase_of("seconds") is None
    assert phase_of("system/cpu_utilization_percentage") is None
    assert phase_of("system/cpu_seconds") is None
    assert phase_of("val_loss") is None
