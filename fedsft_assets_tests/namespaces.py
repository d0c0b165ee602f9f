"""Machines for tests: network namespaces with an address each on one network, whose links can be cut.

They see neither this machine's network nor the world. Needs root and iproute2.
"""

import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

NETWORK = "10.213.0"
_OUTER, _INNER = "port{}", "eth0"


def why_not() -> str | None:
    """Why there can be no namespaces here, or None."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip"):
        return "network namespaces need the command ip of iproute2"
    name = f"fedsft-{uuid.uuid4().hex[:6]}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"network namespaces cannot be made here: {tried.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


@dataclass(frozen=True)
class Network:
    """Machines by name, with their namespace and address, and the namespace of the switch between them."""

    switch: str
    namespaces: dict[str, str]
    addresses: dict[str, str]

    def on(self, machine: str) -> list[str]:
        """What goes before a command that is to run on this machine."""
        return ["ip", "netns", "exec", self.namespaces[machine]]

    def slow(self, machine: str, rate: str) -> None:
        """From now on the machine's link takes and gives no more than `rate` (`4mbit`)."""
        shape = ("root", "tbf", "rate", rate, "burst", "32kb", "latency", "400ms")
        _run("tc", "-n", self.namespaces[machine], "qdisc", "replace", "dev", _INNER, *shape)
        port = _OUTER.format(list(self.namespaces).index(machine))
        _run("tc", "-n", self.switch, "qdisc", "replace", "dev", port, *shape)

    def cut(self, machine: str) -> None:
        """Nothing reaches the machine any more, and nothing of it anybody; its connections do not notice."""
        _ip("-n", self.namespaces[machine], "link", "set", _INNER, "down")

    def restore(self, machine: str) -> None:
        _ip("-n", self.namespaces[machine], "link", "set", _INNER, "up")


@contextmanager
def network(machines: Sequence[str]) -> Iterator[Network]:
    """A network of these machines; its namespaces, and so all in them, are gone afterwards.

    End the processes in them first: a namespace lives as long as they do.
    """
    run = f"fedsft-{uuid.uuid4().hex[:6]}"
    switch = f"{run}-switch"
    made = Network(
        switch=switch,
        namespaces={machine: f"{run}-{machine}" for machine in machines},
        addresses={machine: f"{NETWORK}.{k}" for k, machine in enumerate(machines, start=1)},
    )
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for k, (machine, namespace) in enumerate(made.namespaces.items()):
            outer = _OUTER.format(k)
            _ip("netns", "add", namespace)
            _ip("-n", switch, "link", "add", outer, "type", "veth", "peer", "name", _INNER, "netns", namespace)
            _ip("-n", switch, "link", "set", outer, "master", "bridge", "up")
            _ip("-n", namespace, "address", "add", f"{made.addresses[machine]}/24", "dev", _INNER)
            for link in ("lo", _INNER):
                _ip("-n", namespace, "link", "set", link, "up")
        yield made
    finally:
        for namespace in (*made.namespaces.values(), switch):
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True, check=False)


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
