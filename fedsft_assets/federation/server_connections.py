"""The component in startup kits of servers that were configured with version 0.1 of this package."""


class ServerConnections:
    """Raises RuntimeError, which NVFlare reports when the server starts."""

    def __init__(self) -> None:
        raise RuntimeError(
            "this startup kit was configured with fedsft-assets 0.1; configure it again: fedsft-server configure <kit>"
        )
