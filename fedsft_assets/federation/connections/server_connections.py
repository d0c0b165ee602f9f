"""A component of a server: its own process and those of jobs reach each other where no other account can."""

from nvflare.apis.fl_component import FLComponent

from fedsft_assets.federation.connections.local_driver import use_local_driver


class ServerConnections(FLComponent):
    """NVFlare makes it before it connects anything; `fedsft-server configure` writes it into `resources.json`."""

    def __init__(self) -> None:
        super().__init__()
        use_local_driver()
