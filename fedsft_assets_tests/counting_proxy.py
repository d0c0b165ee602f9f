"""A TCP proxy on loopback that counts what the sockets through it carry, in each direction."""

import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self

_HOST = "127.0.0.1"
_AT_ONCE = 1 << 20  # bytes


@dataclass(frozen=True)
class Carried:
    """Bytes from clients to the server (`up`) and back (`down`)."""

    up: int
    down: int

    def __sub__(self, earlier: "Carried") -> "Carried":
        return Carried(self.up - earlier.up, self.down - earlier.down)


class CountingProxy:
    """Forwards connections at `port` to the server's port on this machine while the block lasts."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listener = socket.create_server((_HOST, 0), backlog=128)
        self.port = int(self._listener.getsockname()[1])
        self._lock = threading.Lock()
        self._counts = {"up": 0, "down": 0}
        self._sockets: list[socket.socket] = []
        self.connections = 0
        """How many there were so far."""

    @property
    def carried(self) -> Carried:
        with self._lock:
            return Carried(**self._counts)

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _close([self._listener])
        self.disconnect()

    def disconnect(self) -> None:
        """End all connections; others may follow."""
        with self._lock:
            _close(self._sockets)
            self._sockets.clear()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            try:
                server = socket.create_connection((_HOST, self._server_port))
            except OSError:  # the server does not listen yet, or not any more
                client.close()
                continue
            with self._lock:
                self._sockets += [client, server]
                self.connections += 1
            for source, target, direction in ((client, server, "up"), (server, client, "down")):
                threading.Thread(target=self._forward, args=(source, target, direction), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket, direction: str) -> None:
        with suppress(OSError):  # closed by either end
            while content := source.recv(_AT_ONCE):
                with self._lock:
                    self._counts[direction] += len(content)  # before anybody can know that it has arrived
                target.sendall(content)
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


def _close(sockets: list[socket.socket]) -> None:
    for one in sockets:
        with suppress(OSError):  # not connected any more
            one.shutdown(socket.SHUT_RDWR)
        one.close()
