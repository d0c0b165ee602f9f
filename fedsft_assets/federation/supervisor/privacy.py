"""Differential privacy accounting over everything that ever left the sites with noise."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsft_assets.files import locked_file, publish_file
from fedsft_assets.specs.job import PrivacySpec

RELEASES_FILE = "privacy.json"
_FAR = 35.0  # beyond this, the asymptotic series is exact to 14 digits
_ROUNDED_UP = 1e-9


class ReleasesError(ValueError):
    """The file of releases is unreadable; the message names it."""


class Releases:
    """Counts the noisy changes that each site has released per dataset and execution, in an append-only file.

    A released change cannot be taken back: it counts even if its execution was abandoned, and adds to all later
    executions over the same dataset of that site.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def charge(
        self, datasets: Mapping[str, str], execution: str, noise_multiplier: float, releases: int, settled: bool = True
    ) -> None:
        """Record the execution's number of releases per site, replacing its previous count.

        Unless `settled`, a count is never lowered. `datasets` maps each site to its dataset. Raises ReleasesError.
        """
        with locked_file(self._path.with_suffix(".lock")):
            known = self._read()
            for site, dataset in datasets.items():
                of_dataset = known.setdefault(site, {}).setdefault(dataset, {})
                before = 0 if settled else of_dataset.get(execution, {}).get("releases", 0)
                of_dataset[execution] = {"noise_multiplier": noise_multiplier, "releases": max(before, releases)}
            with publish_file(self._path) as path:
                path.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")

    def of(self, site: str, dataset: str) -> list[tuple[float, int]]:
        """Noise multiplier and number of releases of each execution. Raises ReleasesError."""
        entries = self._read().get(site, {}).get(dataset, {}).values()
        return [(float(entry["noise_multiplier"]), int(entry["releases"])) for entry in entries]

    def most_spent(self, datasets: Mapping[str, str], privacy: PrivacySpec) -> tuple[float, int]:
        """The largest epsilon spent by any site at the spec's delta, and that site's number of releases."""
        spent = {tuple(self.of(site, dataset)) for site, dataset in datasets.items()}  # usually equal at all sites
        return max((epsilon([*of_site], privacy.delta), sum(count for _, count in of_site)) for of_site in spent)

    def _read(self) -> dict[str, Any]:
        try:
            known: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
            for of_site in known.values():
                for of_dataset in of_site.values():
                    for entry in of_dataset.values():
                        float(entry["noise_multiplier"]), int(entry["releases"])
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise ReleasesError(
                f"{self._path}: not a valid record of releases ({error}); restore it from a backup: without it the"
                " privacy that the sites have spent is unknown"
            ) from error
        return known


def epsilon(spent: list[tuple[float, int]], delta: float) -> float:
    """Epsilon spent on a site's whole dataset; `spent` lists noise multiplier and number of releases per execution.

    Each release is a Gaussian mechanism with sensitivity `clip` to the site's presence. Their composition is a single
    Gaussian mechanism with sensitivity `shift` at standard deviation 1 (Dong, Roth and Su, Gaussian Differential
    Privacy, 2019), whose exact epsilon (Balle and Wang, Improving the Gaussian Mechanism, 2018, theorem 8) is rounded
    up. Values that sites report without noise are not covered: losses, token counts, seconds.
    """
    shift = math.sqrt(math.fsum(releases / noise_multiplier**2 for noise_multiplier, releases in spent))
    if not shift:
        return 0.0
    # Delta decreases with epsilon, so it increases with a = shift / 2 - epsilon / shift.
    low, high = -40.0, shift / 2
    if _delta(shift, high) <= delta:
        return 0.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _delta(shift, middle) <= delta else (low, middle)
    return shift * (shift / 2 - low) * (1 + _ROUNDED_UP)


def _delta(shift: float, a: float) -> float:
    """Phi(a) - e^epsilon Phi(a - shift), in an overflow-free form."""
    density = math.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    return math.erfc(-a / math.sqrt(2)) / 2 - density * _tail_by_density(shift - a)


def _tail_by_density(t: float) -> float:
    """Phi(-t) divided by the standard normal density at t, for t >= 0."""
    if t < _FAR:
        return math.erfc(t / math.sqrt(2)) / 2 * math.sqrt(2 * math.pi) * math.exp(t * t / 2)
    return (1 - 1 / t**2 + 3 / t**4 - 15 / t**6 + 105 / t**8 - 945 / t**10) / t
