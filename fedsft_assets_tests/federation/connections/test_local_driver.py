"""NVFlare's cells connected by Unix sockets, and other accounts that are refused."""

import json
import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from nvflare.fuel.f3 import communicator
from nvflare.fuel.f3.cellnet.cell import Cell
from nvflare.fuel.f3.cellnet.core_cell import CoreCell
from nvflare.fuel.f3.cellnet.utils import new_cell_message
from nvflare.fuel.f3.comm_error import CommError
from nvflare.fuel.f3.drivers.driver_params import DriverParams
from nvflare.fuel.f3.drivers.tcp_driver import TcpDriver
from nvflare.fuel.f3.stats_pool import StatsPoolManager

from fedsft_assets.federation.connections import local_driver, peer
from fedsft_assets.federation.connections.local_driver import (
    LocalDriver,
    is_installed,
    new_port,
    require_local_driver,
    use_local_driver,
)
from fedsft_assets_tests import stranger
from fedsft_assets_tests.sockets import Scan

_LARGE = 20_000_000
_CHILD = """
import os, sys, time
from nvflare.fuel.f3.cellnet.cell import Cell
from nvflare.fuel.f3.cellnet.utils import new_cell_message
from fedsft_assets.federation.connections.local_driver import use_local_driver

use_local_driver()
cell = Cell(fqcn="server.job", root_url=None, secure=False, credentials={}, parent_url=sys.argv[1])
cell.start()
while not cell.is_cell_connected("server"):
    time.sleep(0.1)
message = new_cell_message({}, bytes(int(sys.argv[2])))
print(cell.send_request(channel="test", topic="size", target="server", request=message, timeout=60).payload, flush=True)
os._exit(0)
"""


@pytest.fixture
def used() -> Iterator[None]:
    """As in a process of a job; others in this one are as before."""
    use_local_driver()
    assert is_installed()
    yield
    communicator.driver_mgr.drivers[local_driver.SCHEME] = TcpDriver


@pytest.fixture
def listening(used: None) -> Iterator[tuple[Cell, str]]:  # noqa: ARG001
    """A server's cell, and where it listens for its own processes."""
    cell = _cell("server", root_url=f"tcp://localhost:{new_port()}", create_internal_listener=True)
    cell.register_request_cb(channel="test", topic="size", cb=lambda it: new_cell_message({}, len(it.payload)))
    cell.start()
    yield cell, cell.get_internal_listener_url()
    cell.stop()
    CoreCell.ALL_CELLS.clear()
    StatsPoolManager.pools.clear()


def _cell(name: str, **options: Any) -> Cell:
    return Cell(**{"fqcn": name, "secure": False, "credentials": {}, "root_url": None, **options})


def test_cells_exchange_a_large_message_without_an_open_port(listening: tuple[Cell, str]) -> None:
    _, url = listening
    scan = Scan()
    with _child(url) as child:
        scan.look([psutil.Process()])
        assert child.stdout
        assert json.loads(child.stdout.readline()) == _LARGE
    assert [one for one in scan.sockets if one.kind == "tcp"] == []
    assert f"@fedsft-{url.rpartition(':')[2]}" in {one.address for one in scan.sockets}


def _child(url: str) -> subprocess.Popen[str]:
    """A process with a cell below the server's, which sends it something large."""
    return subprocess.Popen([sys.executable, "-c", _CHILD, url, str(_LARGE)], stdout=subprocess.PIPE, text=True)


@pytest.mark.skipif(stranger.why_not() is not None, reason=str(stranger.why_not()))
def test_another_account_is_refused_and_logged(listening: tuple[Cell, str], caplog: pytest.LogCaptureFixture) -> None:
    _, url = listening
    caplog.set_level(logging.WARNING)
    port = url.rpartition(":")[2]
    (got,) = stranger.tried_as_nobody([["call", f"@fedsft-{port}"]])
    assert not got.connected
    assert f":{port}: the peer has user id {stranger.NOBODY}; only user id" in caplog.text


@pytest.mark.usefixtures("used")
def test_nothing_is_sent_to_another_account_that_took_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    port = new_port()
    monkeypatch.setattr(peer, "user_of", lambda _: 12345)
    connector = SimpleNamespace(params={DriverParams.PORT.value: str(port), DriverParams.URL.value: "tcp://it"})
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(local_driver.socket_name(port))
        other.listen()
        with pytest.raises(CommError, match="tcp://it: the peer has user id 12345"):
            LocalDriver().connect(connector)
        called, _ = other.accept()
        with called:
            assert called.recv(1) == b""


@pytest.mark.parametrize(
    ("resources", "own"),
    [
        ({"host": "localhost", "connection_security": "clear"}, True),
        ({}, True),
        ({"host": "localhost", "connection_security": "mtls"}, False),
        ({"host": "10.0.0.7", "connection_security": "clear"}, False),
    ],
)
def test_connections_with_certificates_or_to_other_machines_use_tcp_ports(resources: dict[str, Any], own: bool) -> None:
    connect, listen = LocalDriver.get_urls("tcp", resources)
    for url in (connect, listen):
        assert (int(url.rpartition(":")[2]) >= 1 << 16) == own


def test_other_systems_than_linux_keep_nvflares_driver_and_log_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(local_driver.sys, "platform", "darwin")
    use_local_driver()
    assert not is_installed()
    assert "every account of this computer can join in" in caplog.text


@pytest.mark.usefixtures("used")
def test_kit_of_an_earlier_version_gets_the_driver_and_an_error(caplog: pytest.LogCaptureFixture) -> None:
    require_local_driver("fedsft-site configure")
    assert caplog.text == ""
    communicator.driver_mgr.drivers[local_driver.SCHEME] = TcpDriver
    require_local_driver("fedsft-site configure")
    assert "configure it again with fedsft-site configure" in caplog.text
    assert is_installed()
