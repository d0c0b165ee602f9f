"""The epsilon that is told, against the exact one of composed Gaussian mechanisms (Balle and Wang, 2018)."""

import json
import math
import threading
from pathlib import Path

import mpmath
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from fedsft_assets.federation.supervisor.privacy import Releases, ReleasesError, epsilon
from fedsft_assets.specs.job import PrivacySpec


def _exact(noise_multiplier: float, releases: int, delta: float) -> float:
    """So many Gaussian mechanisms are one, whose sensitivity is as large as the root of their number."""
    mu = math.sqrt(releases) / noise_multiplier

    def excess(value: float) -> float:
        return float(norm.cdf(-value / mu + mu / 2) - math.exp(value + norm.logcdf(-value / mu - mu / 2)) - delta)

    return float(brentq(excess, 0.0, 500.0))


@pytest.mark.parametrize(("noise_multiplier", "releases"), [(1.0, 1), (4.0, 24), (1.0, 24)])
def test_epsilon_is_that_of_the_composed_mechanism(noise_multiplier: float, releases: int) -> None:
    told = epsilon([(noise_multiplier, releases)], delta=1e-5)
    exact = _exact(noise_multiplier, releases, 1e-5)
    assert exact <= told <= exact * 1.01


@pytest.mark.parametrize(
    ("spent", "delta"),
    [
        ([(1.0, 1)], 1e-12),
        ([(0.4, 1000)], 1e-5),
        ([(1.0, 100_000)], 1e-5),
        ([(0.001, 24), (1.0, 3)], 1e-8),
        ([(1e-9, 24)], 1e-5),
        ([(1000.0, 3)], 1e-5),
        ([(30.0, 1), (31.0, 2)], 1e-3),
    ],
)
def test_epsilon_of_many_releases_and_of_any_noise_is_exact(spent: list[tuple[float, int]], delta: float) -> None:
    """Against Balle and Wang's formula in numbers of 60 digits."""
    mpmath.mp.dps = 60
    shift = mpmath.sqrt(sum(count / mpmath.mpf(noise) ** 2 for noise, count in spent))

    def delta_at(value: mpmath.mpf) -> mpmath.mpf:
        above = mpmath.exp(value) * mpmath.erfc((value / shift + shift / 2) / mpmath.sqrt(2)) / 2
        return mpmath.erfc((value / shift - shift / 2) / mpmath.sqrt(2)) / 2 - above

    told = mpmath.mpf(epsilon(spent, delta))
    assert delta_at(told) <= delta < delta_at(told * (1 - 1e-6))


def test_epsilon_is_that_of_opacus() -> None:
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(2.0, 1.0, 24), (3.0, 1.0, 5)]
    theirs = accountant.get_epsilon(1e-5)
    assert epsilon([(2.0, 24), (3.0, 5)], 1e-5) <= theirs <= epsilon([(2.0, 24), (3.0, 5)], 1e-5) * 1.01


def test_noise_that_hides_all_costs_nothing() -> None:
    assert epsilon([(1e9, 24)], 1e-5) == 0.0


def test_epsilon_is_for_all_that_was_released_whatever_the_noise() -> None:
    assert epsilon([(2.0, 6), (2.0, 0), (2.0, 6)], 1e-5) == pytest.approx(epsilon([(2.0, 12)], 1e-5), rel=1e-2)
    assert epsilon([(2.0, 6), (1.0, 6)], 1e-5) > epsilon([(2.0, 12)], 1e-5)
    assert epsilon([], 1e-5) == epsilon([(1.0, 0)], 1e-5) == 0.0


SITES = {"site-1": "alpaca", "site-2": "dolly"}
PRIVACY = PrivacySpec(clip=1.0, noise_multiplier=2.0, delta=1e-5)


def test_releases_of_all_executions_over_a_sites_data_count_for_ever(tmp_path: Path) -> None:
    releases = Releases(tmp_path / "privacy.json")
    releases.charge(SITES, "one", 2.0, 10)
    releases.charge(SITES, "one", 2.0, 6)  # the last word on an execution counts
    releases.charge({"site-1": "alpaca"}, "two", 1.0, 6)
    releases.charge({"site-1": "oasst1", "site-3": "alpaca"}, "three", 1.0, 99)
    again = Releases(tmp_path / "privacy.json")  # as the next process sees it
    assert again.of("site-1", "alpaca") == [(2.0, 6), (1.0, 6)]
    assert again.of("site-2", "dolly") == [(2.0, 6)]
    assert again.of("site-9", "alpaca") == []
    assert again.most_spent(SITES, PRIVACY) == (epsilon([(2.0, 6), (1.0, 6)], 1e-5), 12)


def test_jobs_that_charge_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    def charge(execution: str) -> None:
        Releases(tmp_path / "privacy.json").charge(SITES, execution, 2.0, 1)

    threads = [threading.Thread(target=charge, args=[str(number)]) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Releases(tmp_path / "privacy.json").of("site-1", "alpaca")) == 16


@pytest.mark.parametrize("content", ["", "[]", '{"site-1": 3}', '{"site-1": {"alpaca": {"one": {"releases": 3}}}}'])
def test_damaged_record_of_releases_is_named_and_never_taken_for_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "privacy.json"
    path.write_text(content)
    with pytest.raises(ReleasesError, match=rf"{path}: not a valid record of releases .* restore it from a backup"):
        Releases(path).charge(SITES, "one", 2.0, 1)
    assert path.read_text() == content


def test_record_of_releases_is_json_that_a_person_can_read(tmp_path: Path) -> None:
    Releases(tmp_path / "privacy.json").charge({"site-1": "alpaca"}, "one", 2.0, 3)
    content = json.loads((tmp_path / "privacy.json").read_text())
    assert content == {"site-1": {"alpaca": {"one": {"noise_multiplier": 2.0, "releases": 3}}}}
