"""The runtime `production`: jobs in a federation that others operate, submitted with an admin's startup kit.

The connection is NVFlare's own, with mutual TLS by the certificates of the kit.
"""

from collections.abc import Iterator
from pathlib import Path

from fedsft_assets.access import close_kit
from fedsft_assets.federation.runtimes.flare.jobs import FlareJobs
from fedsft_assets.federation.runtimes.flare.rights import require_rights
from fedsft_assets.federation.runtimes.flare.session import FlareSession
from fedsft_assets.federation.runtimes.interface import UnavailableError
from fedsft_assets.specs.runtime import ProductionSettings


class Production(FlareJobs):
    """Jobs in the federation of the settings' startup kit."""

    def __init__(self, settings: ProductionSettings, folder: Path) -> None:
        """`folder` takes downloads and temporary files. Raises UnavailableError without a startup kit."""
        if settings.startup_kit is None:
            raise UnavailableError(
                "FEDSFT_PRODUCTION__STARTUP_KIT is not set; set it to the admin's startup kit, the folder that contains"
                " startup/fed_admin.json"
            )
        super().__init__(FlareSession(settings.startup_kit, folder, settings.study, settings.timeouts))

    def gather(self, sites: list[str], at_least: int) -> Iterator[str]:
        """Raises RefusedError too, which lists every right that the server's policy does not grant."""
        kit = self.session.startup_kit
        if (kit / "startup" / "fed_admin.json").is_file() and (warning := close_kit(kit)):
            yield warning
        self.session.call(lambda session: session.get_system_info(), self.session.timeouts.connect)
        require_rights(self.session)
        yield from super().gather(sites, at_least)
