"""The epsilon that is told, against the exact one of composed Gaussian mechanisms (Balle and Wang, 2018)."""

import math

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from fedsft_assets.federation.privacy import epsilon
from fedsft_assets.specs import PrivacySpec


def _exact(noise_multiplier: float, releases: int, delta: float) -> float:
    """So many Gaussian mechanisms are one, whose sensitivity is as large as the root of their number."""
    mu = math.sqrt(releases) / noise_multiplier

    def excess(value: float) -> float:
        return float(norm.cdf(-value / mu + mu / 2) - math.exp(value + norm.logcdf(-value / mu - mu / 2)) - delta)

    return float(brentq(excess, 0.0, 500.0))


@pytest.mark.parametrize(("noise_multiplier", "releases"), [(1.0, 1), (4.0, 24), (1.0, 24)])
def test_epsilon_is_that_of_the_composed_mechanism(noise_multiplier: float, releases: int) -> None:
    told = epsilon(PrivacySpec(clip=1.0, noise_multiplier=noise_multiplier, delta=1e-5), releases)
    exact = _exact(noise_multiplier, releases, 1e-5)
    assert exact <= told <= exact * 1.01


def test_epsilon_does_not_depend_on_where_changes_are_clipped() -> None:
    one, other = (epsilon(PrivacySpec(clip=clip, noise_multiplier=2.0), 3) for clip in (0.1, 10.0))
    assert one == other
