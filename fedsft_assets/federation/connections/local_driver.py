"""An NVFlare driver that connects processes of one machine by Unix sockets, and checks the peer's user id.

NVFlare's own driver listens on loopback ports without authentication, where every account of the machine can connect.
This driver replaces it for connections without certificates that stay on the machine: a port above the range of TCP
stands for an abstract socket of Linux. Other accounts can see its name, but are refused by the user id that the kernel
reports. Connections from other machines, or with certificates, are left to NVFlare's driver.
"""

import logging
import secrets
import socket
import sys
from pathlib import Path
from socketserver import ThreadingMixIn, UnixStreamServer
from typing import Any

from nvflare.fuel.f3 import communicator, drivers
from nvflare.fuel.f3.comm_config_utils import requires_secure_connection
from nvflare.fuel.f3.comm_error import CommError
from nvflare.fuel.f3.drivers.connector_info import ConnectorInfo
from nvflare.fuel.f3.drivers.driver_params import DriverParams
from nvflare.fuel.f3.drivers.socket_conn import ConnectionHandler, SocketConnection
from nvflare.fuel.f3.drivers.tcp_driver import TcpDriver

from fedsft_assets.federation.connections.peer import require_own_user

SCHEME = "tcp"
_TCP_PORTS = 1 << 16
_RANDOM_BITS = 62  # enough for names that are unique on the machine
_LOOPBACK = ("localhost", "127.0.0.1")
_BACKLOG = 1024  # connections; a site that has to retry waits for seconds

_logger = logging.getLogger(__name__)


def use_local_driver() -> None:
    """Install the driver in this process. On other systems than Linux, log a warning and change nothing."""
    if not is_supported():
        _logger.warning(
            f"on {sys.platform}, processes of a job are connected over ports of 127.0.0.1 without authentication: every"
            " account of this computer can join in; run jobs on Linux, or on a computer without other accounts"
        )
        return
    # Load NVFlare's drivers first: it loads them once, and would replace this one.
    communicator.driver_mgr.search_folder(str(Path(drivers.__file__).parent), drivers.__package__)
    communicator.driver_mgr.drivers[SCHEME] = LocalDriver


def is_installed() -> bool:
    """Whether this process uses the driver."""
    return communicator.driver_mgr.drivers.get(SCHEME) is LocalDriver


def require_local_driver(configure: str) -> None:
    """Install the driver unless the startup kit already did; then log that `configure` must be run on the kit."""
    if is_installed() or not is_supported():
        return
    _logger.error(
        "this startup kit was configured by an earlier version, so other accounts of this computer can connect to its"
        f" processes; configure it again with {configure}, and restart it"
    )
    use_local_driver()


def is_supported() -> bool:
    """Whether this system has abstract sockets and reports the user id of their peers."""
    return sys.platform == "linux"


def new_port() -> int:
    """A port that stands for a new socket."""
    return _TCP_PORTS + secrets.randbits(_RANDOM_BITS)


def socket_name(port: int) -> str:
    """The abstract name of the socket that a port stands for."""
    return f"\0fedsft-{port}"


class LocalDriver(TcpDriver):
    """NVFlare's TCP driver, with abstract sockets for ports above the range of TCP."""

    def listen(self, connector: ConnectorInfo) -> None:
        name = _name(connector)
        if name is None:
            super().listen(connector)
            return
        self.connector = connector
        connector.params[DriverParams.IMPLEMENTED_CONN_SEC.value] = "own user"
        self.server = _Server(self, connector, name)
        self.server.serve_forever()

    def connect(self, connector: ConnectorInfo) -> None:
        name = _name(connector)
        if name is None:
            super().connect(connector)
            return
        self.connector = connector
        with socket.socket(socket.AF_UNIX) as connected:
            try:
                connected.connect(name)
                require_own_user(connected)
            except OSError as error:
                raise CommError(CommError.CLOSED, f"{connector.params.get(DriverParams.URL.value)}: {error}") from error
            connection = SocketConnection(connected, connector)
            self.add_connection(connection)
            connection.read_loop()
            self.close_connection(connection)

    @staticmethod
    def get_urls(scheme: str, resources: dict[str, Any]) -> tuple[str, str]:
        """The URLs to connect to and to listen at; the hosts are those that NVFlare expects without TLS."""
        host = resources.get(DriverParams.HOST.value) or _LOOPBACK[0]
        if requires_secure_connection(resources) or host not in _LOOPBACK:
            connect, listen = TcpDriver.get_urls(scheme, resources)
            return str(connect), str(listen)
        port = new_port()
        return f"{scheme}://localhost:{port}", f"{scheme}://127.0.0.1:{port}"


class _Server(ThreadingMixIn, UnixStreamServer):
    """NVFlare's socket server, for processes of this user only."""

    request_queue_size = _BACKLOG
    ssl_context = None  # read by NVFlare's handler

    def __init__(self, driver: LocalDriver, connector: ConnectorInfo, name: str) -> None:
        self.driver, self.connector = driver, connector
        self._reported: set[str] = set()
        super().__init__(name, ConnectionHandler)

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ARG002
        try:
            require_own_user(request)
        except OSError as error:
            if str(error) not in self._reported:  # once for each account, which could fill the disk otherwise
                self._reported.add(str(error))
                _logger.warning(f"connection refused at {self.connector.params.get(DriverParams.URL.value)}: {error}")
            return False
        return True


def _name(connector: ConnectorInfo) -> str | None:
    """The name of the connector's abstract socket; None for a TCP port."""
    port = int(connector.params.get(DriverParams.PORT.value) or 0)
    return socket_name(port) if port >= _TCP_PORTS else None
