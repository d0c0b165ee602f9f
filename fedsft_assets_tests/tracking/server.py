"""A real MLflow server on loopback that tests start, kill and start again, and a proxy that gets in its way."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

HOST = "127.0.0.1"


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


class TrackingServer:
    """`mlflow server` over one SQLite file, which outlives it; artifacts go through it."""

    def __init__(self, folder: Path) -> None:
        self.port = unused_port()
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def start(self) -> None:
        command = [
            *(sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(self.port), "--workers", "1"),
            *("--backend-store-uri", f"sqlite:///{self._folder / 'mlflow.db'}"),
            *("--artifacts-destination", str(self._folder / "artifacts")),
        ]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        deadline = time.monotonic() + 300
        while not _answers(self.port):
            log_file = self._folder / "server.log"
            assert self._process.poll() is None, f"the server has ended:\n{log_file.read_text()}"
            assert time.monotonic() < deadline, f"the server does not come up:\n{log_file.read_text()}"
            time.sleep(0.1)

    def kill(self) -> None:
        """End it and all its children at once, in the middle of whatever they do."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def _answers(port: int) -> bool:
    try:
        with socket.create_connection((HOST, port), timeout=1) as connection:
            connection.settimeout(5)
            connection.sendall(b"GET /health HTTP/1.0\r\n\r\n")
            return connection.recv(64).split()[1:2] == [b"200"]
    except OSError:
        return False


class Proxy:
    """Passes connections on to a server, as `forward` says for each request.

    `forward` gets the first line of an HTTP request and returns "pass"; "drop": the server serves the request,
    and the connection is closed in place of its answer; "late": the server gets it after `delay` seconds; or "hold":
    nothing happens until the proxy is closed. `served` are the first lines of requests that the server has answered.
    """

    def __init__(self, port: int, forward: Callable[[str], str], delay: float = 0.0) -> None:
        self._server_port = port
        self._forward = forward
        self._delay = delay
        self.requests: list[str] = []
        self.served: list[str] = []
        self.closed = threading.Event()
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self._listener.close()

    def _accept(self) -> None:
        while not self.closed.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """One connection: a request at a time, whole, each on a connection of its own to the server."""
        with client:
            try:
                while request := _read_request(client):
                    line = request.split(b"\r\n", 1)[0].decode()
                    self.requests.append(line)
                    what = self._forward(line)
                    if what == "hold":
                        self.closed.wait()
                        return
                    if what == "late":
                        self.closed.wait(self._delay)
                    answer = self._ask(request)
                    self.served.append(line)
                    if what == "drop":
                        return
                    client.sendall(answer)
                    return
            except OSError:
                return

    def _ask(self, request: bytes) -> bytes:
        head, body = request.split(b"\r\n\r\n", 1)
        lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
        with socket.create_connection((HOST, self._server_port)) as server:
            server.sendall(b"\r\n".join([*lines, b"Connection: close"]) + b"\r\n\r\n" + body)
            answer = b""
            while part := server.recv(1 << 16):
                answer += part
            return answer


def _read_request(client: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        part = client.recv(1 << 16)
        if not part:
            return b""
        data += part
    head, body = data.split(b"\r\n\r\n", 1)
    lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    while len(body) < int(lengths[0] if lengths else 0):
        part = client.recv(1 << 16)
        if not part:
            return b""
        body += part
    return head + b"\r\n\r\n" + body
