"""Privacy accounting of an execution: releases are charged before they can happen."""

from fedsft_assets.federation.supervisor.privacy import Releases
from fedsft_assets.specs.job import JobSpec


class PrivacyCharges:
    """Charges for the executions of one job; without noise, nothing is charged."""

    def __init__(self, releases: Releases, spec: JobSpec) -> None:
        self._releases, self._privacy = releases, spec.filters.privacy
        self._datasets = {name: site.dataset for name, site in spec.sites.items()}

    def charge(self, execution: str, releases: int, settled: bool = True) -> None:
        """Record the releases on disk before they can leave the sites, so that the count is never too low."""
        if self._privacy:
            self._releases.charge(self._datasets, execution, self._privacy.noise_multiplier, releases, settled)

    def spent(self) -> tuple[float, int] | tuple[None, None]:
        """The largest epsilon that any site has spent over all executions, and its number of releases."""
        return self._releases.most_spent(self._datasets, self._privacy) if self._privacy else (None, None)
