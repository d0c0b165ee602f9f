"""What an execution's releases cost its sites in privacy, charged before they can happen."""

from fedsft_assets.federation.supervisor.privacy import Releases
from fedsft_assets.specs.job import JobSpec


class PrivacyCharges:
    """Those of the executions of one job; without noise, nothing is charged."""

    def __init__(self, releases: Releases, spec: JobSpec) -> None:
        self._releases, self._privacy = releases, spec.filters.privacy
        self._datasets = {name: site.dataset for name, site in spec.sites.items()}

    def charge(self, execution: str, releases: int, settled: bool = True) -> None:
        """Have it on the disk before they leave the sites: whoever asks later must not find fewer."""
        if self._privacy:
            self._releases.charge(self._datasets, execution, self._privacy.noise_multiplier, releases, settled)

    def spent(self) -> tuple[float, int] | tuple[None, None]:
        """What a site spent of its privacy at most, up to now and ever, and for how many releases."""
        return self._releases.most_spent(self._datasets, self._privacy) if self._privacy else (None, None)
