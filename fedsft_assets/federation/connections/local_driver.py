"""How NVFlare's processes of one machine reach each other here: by Unix sockets, which know who is at the other end.

NVFlare has them listen on loopback ports without a key, where every account of the machine gets in. In place of its
driver for such ports, this one takes what has no certificate and stays on the machine. A port above all that TCP has
stands for an abstract socket of Linux: any account finds its name, and is turned away by the user id that the kernel
says. What listens for other machines, or with certificates, is NVFlare's as before.
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
_RANDOM_BITS = 62  # so that no two sockets of a machine have one name
_LOOPBACK = ("localhost", "127.0.0.1")
_WAITING = 1024  # connections; a site that has to try again waits seconds

_logger = logging.getLogger(__name__)


def use_local_driver() -> None:
    """From now on, in this process. Where there are no such sockets, its log says so, and all is as before."""
    if not can_be_used():
        _logger.warning(
            f"on {sys.platform}, processes of a job talk over ports of 127.0.0.1 without a key:"
            " every account of this computer can join in; run jobs where there are no others, or on Linux"
        )
        return
    # NVFlare's own first, which it would find again without a word, and not put in place of this one.
    communicator.driver_mgr.search_folder(str(Path(drivers.__file__).parent), drivers.__package__)
    communicator.driver_mgr.drivers[SCHEME] = LocalDriver


def is_used() -> bool:
    """Whether this process does."""
    return communicator.driver_mgr.drivers.get(SCHEME) is LocalDriver


def require_local_driver(configure: str) -> None:
    """Use it from now on, and say that the startup kit is to be configured, by this command, if it did not before."""
    if is_used() or not can_be_used():
        return
    _logger.error(
        "this startup kit was configured by an earlier version, and other accounts of this computer can reach its"
        f" processes; configure it again with {configure}, and start it again"
    )
    use_local_driver()


def can_be_used() -> bool:
    """Whether this machine has abstract sockets, and says who is at their other end."""
    return sys.platform == "linux"


def new_port() -> int:
    """A number that stands for a socket of its own."""
    return _TCP_PORTS + secrets.randbits(_RANDOM_BITS)


def socket_name(port: int) -> str:
    """The abstract name that a port stands for."""
    return f"\0fedsft-{port}"


class LocalDriver(TcpDriver):
    """NVFlare's, with sockets of this machine where a port is none of TCP's."""

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
        with socket.socket(socket.AF_UNIX) as found:
            try:
                found.connect(name)
                require_own_user(found)
            except OSError as error:
                raise CommError(CommError.CLOSED, f"{connector.params.get(DriverParams.URL.value)}: {error}") from error
            connection = SocketConnection(found, connector)
            self.add_connection(connection)
            connection.read_loop()
            self.close_connection(connection)

    @staticmethod
    def get_urls(scheme: str, resources: dict[str, Any]) -> tuple[str, str]:
        """The URL to connect to, and the one to listen at; the host is what NVFlare expects of a clear connection."""
        host = resources.get(DriverParams.HOST.value) or _LOOPBACK[0]
        if requires_secure_connection(resources) or host not in _LOOPBACK:
            connect, listen = TcpDriver.get_urls(scheme, resources)
            return str(connect), str(listen)
        port = new_port()
        return f"{scheme}://localhost:{port}", f"{scheme}://127.0.0.1:{port}"


class _Server(ThreadingMixIn, UnixStreamServer):
    """As NVFlare's, and for processes of this user alone."""

    request_queue_size = _WAITING
    ssl_context = None  # which NVFlare's handler asks for

    def __init__(self, driver: LocalDriver, connector: ConnectorInfo, name: str) -> None:
        self.driver, self.connector = driver, connector
        self._told: set[str] = set()
        super().__init__(name, ConnectionHandler)

    def verify_request(self, request: Any, client_address: Any) -> bool:  # noqa: ARG002
        try:
            require_own_user(request)
        except OSError as error:
            if str(error) not in self._told:  # once of each account, which could fill the disk otherwise
                self._told.add(str(error))
                _logger.warning(f"refused at {self.connector.params.get(DriverParams.URL.value)}: {error}")
            return False
        return True


def _name(connector: ConnectorInfo) -> str | None:
    """Of the socket that is meant; None if it is a port of TCP."""
    port = int(connector.params.get(DriverParams.PORT.value) or 0)
    return socket_name(port) if port >= _TCP_PORTS else None
