"""The scan itself finds what it is there to find."""

import os
import socket
import subprocess
import sys

import psutil
import pytest

from fedsft_assets.federation.runtimes.processes import MARK
from fedsft_assets_tests.sockets import OpenSocket, Scan, scanned

_OPEN = """
import socket, sys
kind = socket.SOCK_DGRAM if sys.argv[1] == "udp" else socket.SOCK_STREAM
opened = socket.socket(socket.AF_INET6 if ":" in sys.argv[2] else socket.AF_INET, kind)
opened.bind((sys.argv[2], 0))
if sys.argv[1] == "tcp":
    opened.listen()
print(opened.getsockname()[1], flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["tcp", "udp"])
@pytest.mark.parametrize(
    ("address", "local"), [("127.0.0.1", True), ("127.0.0.2", True), ("::1", True), ("0.0.0.0", False), ("::", False)]
)
def test_socket_of_a_marked_process_is_found(kind: str, address: str, local: bool) -> None:
    mark = f"test {os.getpid()} {kind} {address}"
    with (
        scanned(mark) as scan,
        subprocess.Popen(
            [sys.executable, "-c", _OPEN, kind, address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, MARK: mark},
        ) as opener,
    ):
        assert opener.stdout is not None
        port = int(opener.stdout.readline())
        while not scan.sockets:
            assert opener.poll() is None
        opener.communicate()
    (found,) = scan.sockets
    assert (found.kind, found.address, found.port) == (kind, address, port)
    assert scan.beyond_loopback == ([] if local else [found])


def test_socket_that_calls_somebody_is_not_found() -> None:
    scan = Scan()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        scan.look([psutil.Process()])
        port = server.getsockname()[1]
    assert {one.port for one in scan.sockets if one.kind == "tcp"} >= {port}
    assert len([one for one in scan.sockets if one.port == port]) == 1


def test_address_of_the_old_protocol_in_the_new_one_is_what_it_is() -> None:
    assert OpenSocket("a", "tcp", "::ffff:127.0.0.1", 1).is_local
    assert not OpenSocket("a", "tcp", "::ffff:10.0.0.1", 1).is_local
