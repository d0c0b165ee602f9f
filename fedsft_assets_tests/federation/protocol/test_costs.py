"""What the points of a job say that it cost."""

from fedsft_assets.federation.protocol.costs import (
    COSTS_OF_A_SITE,
    CPU_SECONDS,
    PEAK_MEMORY,
    RECEIVED,
    SENT,
    SERVER_CPU_SECONDS,
    Costs,
    costs_of,
    is_cost,
)
from fedsft_assets.federation.protocol.phases import metric_name
from fedsft_assets.federation.protocol.points import Point


def _site(site: str, round: int, sent: float, received: float, cpu: float, peak: float) -> list[Point]:
    values = {SENT: sent, RECEIVED: received, CPU_SECONDS: cpu, PEAK_MEMORY: peak}
    return [Point(name, value, round, 16 * round, site) for name, value in values.items()]


POINTS = [
    *_site("site-1", 0, sent=5, received=100, cpu=1.5, peak=900),
    *_site("site-2", 0, sent=6, received=100, cpu=2.0, peak=700),
    Point(SERVER_CPU_SECONDS, 0.5, 0, 0),
    Point("train_loss", 3.0, 1, 8, "site-1", 1, 100),
    Point("train_loss", 2.9, 1, 16, "site-1", 2, 100),
    Point("train_loss", 3.1, 1, 8, "site-2", 1, 100),
    Point("train_loss", 3.0, 1, 16, None, 1, 200),
    *_site("site-1", 1, sent=55, received=200, cpu=3.0, peak=950),
    Point(SERVER_CPU_SECONDS, 0.75, 1, 32),
    *_site("site-2", 2, sent=106, received=300, cpu=8.0, peak=800),
    Point("val_loss", 7.0, 2, 64, "site-1"),
]


def test_costs_are_the_last_totals_of_all_sites_and_the_server() -> None:
    assert costs_of(POINTS, rounds=2) == Costs(
        steps=3,
        traffic={"site-1": {"sent": 55, "received": 200}, "site-2": {"sent": 106, "received": 300}},
        cpu_seconds=11.75,
        peak_memory=950,
        transferred=[211, 361, 661],
    )


def test_costs_do_not_depend_on_the_order_of_points() -> None:
    assert costs_of(POINTS[::-1], rounds=2) == costs_of(POINTS, rounds=2)


def test_steps_without_a_result_in_the_model_do_not_count() -> None:
    assert costs_of(POINTS, rounds=2, missed={("site-1", 1), ("site-2", 2)}).steps == 1


def test_costs_that_no_site_has_reported_are_unknown() -> None:
    points = [point for point in POINTS if point.name not in COSTS_OF_A_SITE]
    assert costs_of(points, rounds=2) == Costs(3, None, None, None, None)


def test_phases_and_other_costs_are_told_from_what_a_job_learns() -> None:
    assert all(is_cost(name) for name in (metric_name("train"), SERVER_CPU_SECONDS, *COSTS_OF_A_SITE))
    assert not any(is_cost(name) for name in ("val_loss", "train_loss", "system/cpu_utilization_percentage", "round"))
