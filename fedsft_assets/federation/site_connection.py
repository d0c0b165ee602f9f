"""Named by the startup kits of sites that version 0.1 of this package configured."""


class SiteConnection:
    """Raises RuntimeError, which NVFlare says as the site starts."""

    def __init__(self) -> None:
        raise RuntimeError(
            "this startup kit was configured with fedsft-assets 0.1; configure it again: fedsft-site configure <kit>"
        )
