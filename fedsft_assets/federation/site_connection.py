"""The component in startup kits of sites that were configured with version 0.1 of this package."""


class SiteConnection:
    """Raises RuntimeError, which NVFlare reports when the site starts."""

    def __init__(self) -> None:
        raise RuntimeError(
            "this startup kit was configured with fedsft-assets 0.1; configure it again: fedsft-site configure <kit>"
        )
