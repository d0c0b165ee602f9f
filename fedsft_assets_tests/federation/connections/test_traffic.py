"""What a cell counts of its exchange with a server, beside what their socket carries."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from nvflare.fuel.f3.cellnet.cell import Cell
from nvflare.fuel.f3.cellnet.core_cell import CoreCell
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.stats_pool import StatsPoolManager
from nvflare.private.fed.utils.fed_utils import nvflare_fobs_initialize

from fedsft_assets.federation.connections.traffic import count_traffic
from fedsft_assets.federation.protocol.meter import Meter
from fedsft_assets_tests.counting_proxy import Carried, CountingProxy
from fedsft_assets_tests.tracking.server import unused_port

# A cell that answers a request with as many bytes as it asks for, until its standard input ends.
_PEER = """
import sys
from nvflare.fuel.f3.cellnet.cell import Cell
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.fuel.f3.message import Message
from nvflare.private.fed.utils.fed_utils import nvflare_fobs_initialize

nvflare_fobs_initialize()
cell = Cell(fqcn=sys.argv[1], root_url=f"tcp://localhost:{sys.argv[2]}", secure=False, credentials={})
cell.core_cell.register_request_cb(
    "test", "echo", lambda message: make_reply("ok", body=bytes(message.payload["wanted"]))
)
cell.start()
print(flush=True)
sys.stdin.read()
"""
_UP, _DOWN = 3_000_000, 5_000_000  # bytes


@pytest.fixture
def start() -> Iterator[Callable[[str, int], None]]:
    """Start a cell in a process of its own, with its name and the server's port; all are ended afterwards."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(name: str, port: int) -> None:
        command = [sys.executable, "-c", _PEER, name, str(port)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert started[-1].stdout
        started[-1].stdout.readline()

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def connect() -> Iterator[Callable[[int], Cell]]:
    """Connect a site's cell to a server's port."""
    cells: list[Cell] = []

    def begin(port: int) -> Cell:
        nvflare_fobs_initialize()
        cells.append(Cell(fqcn="site-1", root_url=f"tcp://localhost:{port}", secure=False, credentials={}))
        cells[-1].start()
        return cells[-1]

    yield begin
    for cell in cells:
        cell.stop()
    CoreCell.ALL_CELLS.clear()
    StatsPoolManager.pools.clear()


def _exchange(cell: Cell, peer: str) -> None:
    """Send and get the bytes, as soon as there is a connection."""
    deadline = time.monotonic() + 60
    while True:
        message = Message(payload={"wanted": _DOWN, "sent": bytes(_UP)})
        reply = cell.core_cell.send_request("test", "echo", peer, message, timeout=60.0)
        if reply.get_header(MessageHeaderKey.RETURN_CODE) == ReturnCode.OK:
            assert len(reply.payload) == _DOWN
            return
        assert time.monotonic() < deadline, reply.headers
        time.sleep(0.05)


def test_frames_with_the_server_are_what_the_socket_carries(
    start: Callable[[str, int], None], connect: Callable[[int], Cell]
) -> None:
    port, meter = unused_port(), Meter()
    start("server", port)
    with CountingProxy(port) as proxy:
        cell = connect(proxy.port)
        _exchange(cell, "server")
        before = proxy.carried
        count_traffic(cell.core_cell, meter)
        for _ in range(2):
            _exchange(cell, "server")
        _require(meter, proxy.carried - before, exchanges=2)
        _disconnect(proxy, cell)
        _exchange(cell, "server")
        _require(meter, proxy.carried - before, exchanges=3)
        assert proxy.connections == 2


def _disconnect(proxy: CountingProxy, cell: Cell) -> None:
    """End the connection, and wait until the cell knows."""
    connections = cell.core_cell.communicator.conn_manager.sfm_conns
    (name,) = connections
    proxy.disconnect()
    deadline = time.monotonic() + 60
    while name in connections:
        assert time.monotonic() < deadline, "the cell does not see that its connection has ended"
        time.sleep(0.05)


def _require(meter: Meter, carried: Carried, exchanges: int) -> None:
    usage = meter.read()
    assert usage.sent >= exchanges * _UP
    assert usage.received >= exchanges * _DOWN
    assert usage.sent == pytest.approx(carried.up, abs=2000)  # the first frames of a connection say who is who
    assert usage.received == pytest.approx(carried.down, abs=2000)
