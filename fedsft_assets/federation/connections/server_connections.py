"""A server component that closes the connections between its processes to other accounts of the machine."""

from nvflare.apis.fl_component import FLComponent

from fedsft_assets.federation.connections.local_driver import use_local_driver


class ServerConnections(FLComponent):
    """NVFlare creates it before any connection; `fedsft-server configure` writes it into `resources.json`."""

    def __init__(self) -> None:
        super().__init__()
        use_local_driver()
