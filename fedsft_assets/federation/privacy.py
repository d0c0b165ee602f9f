"""What a site's releases cost in privacy."""

import warnings

from fedsft_assets.specs import PrivacySpec

_LEAST_NOISE = 0.4


def epsilon(privacy: PrivacySpec, releases: int) -> float:
    """The epsilon that a site spends on its whole data with so many changes that leave it, at the spec's delta.

    Each is a Gaussian mechanism whose outcome differs by at most `clip` with and without the site; they are composed
    by privacy random variables (Gopi et al., 2021, as opacus has it). What sites tell without noise is not in it:
    losses, token counts, seconds.
    """
    from opacus.accountants import PRVAccountant, RDPAccountant

    # With next to no noise, losses lie beyond the grid of the one; Rényi's bound has none.
    accountant = PRVAccountant() if privacy.noise_multiplier >= _LEAST_NOISE else RDPAccountant()
    accountant.history = [(privacy.noise_multiplier, 1.0, releases)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the logarithm of 0 where all records are sampled, and orders near 1
        return float(accountant.get_epsilon(privacy.delta))
