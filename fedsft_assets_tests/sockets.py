"""What a scan would find of a job while it runs: the sockets of its processes that wait for somebody to call."""

import ipaddress
import os
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from fedsft_assets.federation.runtimes.processes import marked_processes

_SECONDS_BETWEEN_LOOKS = 0.2
_LISTENS = 0x10000  # Linux' __SO_ACCEPTCON


@dataclass(frozen=True)
class OpenSocket:
    """`program` is the Python module that the process runs, or the name of the program.

    `kind` is tcp, udp or unix; the address of a Unix socket is its path, or its abstract name after an @.
    """

    program: str
    kind: str
    address: str
    port: int = 0

    @property
    def is_local(self) -> bool:
        """Whether it can be reached from this machine only."""
        if self.kind == "unix":
            return True
        address = ipaddress.ip_address(self.address)
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return (mapped or address).is_loopback


@dataclass
class Scan:
    """What was seen so far: of which programs there were processes, and their sockets."""

    programs: set[str] = field(default_factory=set)
    sockets: set[OpenSocket] = field(default_factory=set)

    @property
    def beyond_loopback(self) -> list[OpenSocket]:
        return sorted((one for one in self.sockets if not one.is_local), key=str)

    def look(self, processes: Iterable[psutil.Process]) -> None:
        """Add what these processes have now: sockets that listen, UDP sockets that are not for one peer alone."""
        for process in processes:
            try:
                if not process.cmdline():
                    continue  # it is ending: its memory is gone, and its sockets are about to be
                program, connections = _program(process), process.net_connections("inet")
                addresses = _listening_unix(process)
            except (psutil.Error, OSError):
                continue  # it ended meanwhile
            self.programs.add(program)
            self.sockets |= {OpenSocket(program, "unix", address) for address in addresses}
            for one in connections:
                udp = one.type == socket.SOCK_DGRAM
                if one.status == psutil.CONN_LISTEN or (udp and one.laddr and not one.raddr):
                    self.sockets.add(OpenSocket(program, "udp" if udp else "tcp", one.laddr.ip, one.laddr.port))


@contextmanager
def scanned(*marks: str) -> Iterator[Scan]:
    """Look again and again, as long as the block takes, at all processes that carry one of the marks."""
    scan, over = Scan(), threading.Event()

    def go_on() -> None:
        while not over.wait(_SECONDS_BETWEEN_LOOKS):
            scan.look(process for mark in marks for process in marked_processes(mark))

    looking = threading.Thread(target=go_on, daemon=True)
    looking.start()
    try:
        yield scan
    finally:
        over.set()
        looking.join()


def _listening_unix(process: psutil.Process) -> list[str]:
    """Where the process listens for others by Unix sockets."""
    own = set()
    for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(OSError):
            own.add(os.readlink(descriptor))  # noqa: PTH115 it is no path
    addresses = []
    for line in Path(f"/proc/{process.pid}/net/unix").read_text().splitlines()[1:]:
        _, _, _, flags, _, _, inode, *address = line.split(maxsplit=7)
        if int(flags, 16) & _LISTENS and f"socket:[{inode}]" in own:
            addresses.append("".join(address))
    return addresses


def _program(process: psutil.Process) -> str:
    modules = [word for word in process.cmdline() if word.startswith(("nvflare.", "fedsft_assets."))]
    return modules[-1] if modules else process.name()
