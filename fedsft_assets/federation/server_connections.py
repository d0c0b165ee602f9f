"""Named by the startup kits of servers that version 0.1 of this package configured."""


class ServerConnections:
    """Raises RuntimeError, which NVFlare says as the server starts."""

    def __init__(self) -> None:
        raise RuntimeError(
            "this startup kit was configured with fedsft-assets 0.1; configure it again: fedsft-server configure <kit>"
        )
