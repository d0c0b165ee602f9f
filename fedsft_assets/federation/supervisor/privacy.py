"""What sites' releases cost in privacy, of all that ever left them with noise."""

import fcntl
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedsft_assets.files import publish_file
from fedsft_assets.specs.job import PrivacySpec

RELEASES_FILE = "privacy.json"
_FAR = 35.0  # from here on the series is right to 14 digits
_ROUNDED_UP = 1e-9


class ReleasesError(ValueError):
    """The file of releases cannot be read; the message names it."""


class Releases:
    """How many noisy changes each site has released of each of its datasets, by execution, in a file that only grows.

    A change that has left a site cannot be taken back: what an execution released counts also if it was given up, and
    for every later one over the same dataset of that site.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def charge(
        self, datasets: Mapping[str, str], execution: str, noise_multiplier: float, releases: int, settled: bool = True
    ) -> None:
        """Write down that the execution takes so many releases of each site; the last word on an execution counts.

        Not `settled`, the word takes back nothing that was charged before. `datasets` has each site's. Raises
        ReleasesError.
        """
        with self._locked():
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
        """The epsilon of the site that has spent most, at the spec's delta, and its number of releases."""
        spent = {tuple(self.of(site, dataset)) for site, dataset in datasets.items()}  # mostly the same for all
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
                f"{self._path}: is not a record of releases ({error}); restore it from a backup: without it nobody"
                " knows what the sites have spent"
            ) from error
        return known

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time: two jobs may run at once."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def epsilon(spent: list[tuple[float, int]], delta: float) -> float:
    """The epsilon that a site spends on its whole data with changes that leave it, by noise multiplier so many.

    Each is a Gaussian mechanism whose outcome differs by at most `clip` with and without the site. Together they are
    one, whose outcome differs by `shift` under noise of deviation 1 (Dong, Roth and Su, Gaussian Differential Privacy,
    2019); its epsilon is known exactly (Balle and Wang, Improving the Gaussian Mechanism, 2018, theorem 8) and rounded
    up. What sites tell without noise is not in it: losses, token counts, seconds.
    """
    shift = math.sqrt(math.fsum(releases / noise_multiplier**2 for noise_multiplier, releases in spent))
    if not shift:
        return 0.0
    # Delta falls with epsilon, and so grows with a = shift / 2 - epsilon / shift.
    low, high = -40.0, shift / 2
    if _delta(shift, high) <= delta:
        return 0.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _delta(shift, middle) <= delta else (low, middle)
    return shift * (shift / 2 - low) * (1 + _ROUNDED_UP)


def _delta(shift: float, a: float) -> float:
    """Phi(a) - e^epsilon Phi(a - shift), in a form in which nothing grows without bound."""
    density = math.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    return math.erfc(-a / math.sqrt(2)) / 2 - density * _tail_by_density(shift - a)


def _tail_by_density(t: float) -> float:
    """Phi(-t) by the density at t >= 0."""
    if t < _FAR:
        return math.erfc(t / math.sqrt(2)) / 2 * math.sqrt(2 * math.pi) * math.exp(t * t / 2)
    return (1 - 1 / t**2 + 3 / t**4 - 15 / t**6 + 105 / t**8 - 945 / t**10) / t
