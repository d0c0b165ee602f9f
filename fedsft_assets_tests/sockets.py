"""What a port scan would find of a job while it runs: the sockets of its processes that wait for somebody to call."""

import ipaddress
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

from fedsft_assets.federation.processes import marked_processes

_SECONDS_BETWEEN_LOOKS = 0.2


@dataclass(frozen=True)
class OpenSocket:
    """`program` is the Python module that the process runs, or the name of the program."""

    program: str
    kind: str
    address: str
    port: int

    @property
    def is_local(self) -> bool:
        """Whether it can be reached from this machine only."""
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
        """Add what these processes have now: TCP sockets that listen, UDP sockets that are not for one peer alone."""
        for process in processes:
            try:
                program, connections = _program(process), process.net_connections("inet")
            except psutil.Error:
                continue  # it ended meanwhile
            self.programs.add(program)
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


def _program(process: psutil.Process) -> str:
    words = process.cmdline()
    modules = [word for word in words if word.startswith(("nvflare.", "fedsft_assets."))]
    return modules[-1] if modules else process.name()
