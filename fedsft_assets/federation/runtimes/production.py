"""The runtime `production`: jobs in a federation that others run, submitted with an admin's startup kit.

The connection is NVFlare's own, with mutual TLS by the certificates of the kit.
"""

from collections.abc import Iterator
from pathlib import Path

from fedsft_assets.access import close_kit
from fedsft_assets.federation.runtimes.flare.jobs import FlareJobs, temporary_files_in
from fedsft_assets.federation.runtimes.flare.rights import require_rights
from fedsft_assets.federation.runtimes.interface import UnavailableError
from fedsft_assets.specs.runtime import ProductionSettings


class Production(FlareJobs):
    """`folder` is for what this object downloads, as in FlareJobs. Raises UnavailableError without a startup kit."""

    def __init__(self, settings: ProductionSettings, folder: Path) -> None:
        if settings.startup_kit is None:
            raise UnavailableError(
                "FEDSFT_PRODUCTION__STARTUP_KIT is not set; set it to the admin's startup kit, the folder that has"
                " startup/fed_admin.json"
            )
        super().__init__(settings.startup_kit, folder, settings.study, settings.timeouts)
        self._startup_kit = settings.startup_kit

    def gather(self, sites: list[str], at_least: int) -> Iterator[str]:
        """Raises RefusedError too, which names every right that the server's policy lacks."""
        if (self._startup_kit / "startup" / "fed_admin.json").is_file() and (said := close_kit(self._startup_kit)):
            yield said
        self._session.call(lambda session: session.get_system_info(), self.timeouts.connect)
        with temporary_files_in(self._folder):
            require_rights(self._session, self._folder)
        yield from super().gather(sites, at_least)
