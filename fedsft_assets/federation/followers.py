"""More than one device at a site: a process each, of which rank 0 alone talks to NVFlare and the others follow it.

Everything stays on this machine: processes find each other through a file and talk over the loopback interface.
"""

import os
import socket
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple
from uuid import uuid4

# What a site waits for is the other sites, and a round of theirs may take days.
_LONGEST_WAIT = timedelta(days=365)


class Task(NamedTuple):
    """What all ranks do next, with the weights that rank 0 has been given."""

    kind: Literal["train", "evaluate"]
    round: int


def start_all(devices: int, folder: Path) -> None:
    """Become torchrun, which starts this same command for each of the devices; returns in those processes only.

    `folder` gets short-lived files through which they meet, and what torchrun keeps of each.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return
    from fedsft_assets.model.devices import MEETING_FILE

    meeting = folder.absolute() / f"devices-{uuid4().hex}"
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)  # of the site's trainer
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(max(1, threads // devices)),
        MEETING_FILE: str(meeting),
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # a server that listens on all interfaces
    }
    command = [
        *(sys.executable, "-u", "-m", "torch.distributed.run", "--nproc-per-node", str(devices)),
        *("--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file", "--rdzv-endpoint", f"{meeting}-torchrun"),
        *("--local-addr", "127.0.0.1", "--rdzv-id", meeting.name, "--log-dir", str(folder.absolute())),
        *("-m", "fedsft_assets.federation.client", *sys.argv[1:]),
    ]
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)


class Followers:
    """The other ranks, as rank 0 sees them, and rank 0, as they see it."""

    def __init__(self) -> None:
        import torch.distributed as dist

        # Apart from the group that trains: waiting in that one would keep GPUs busy, and end after minutes.
        self._group = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)

    def tell(self, task: Task | None) -> None:
        """Rank 0: what is to be done next, or None if nothing is."""
        self._broadcast(task)

    def tasks(self) -> Iterator[Task]:
        """Other ranks: what rank 0 tells, until nothing is left to do."""
        while task := self._broadcast(None):
            yield task

    def part(self) -> None:
        """All ranks, when nothing is left to do: leave every group, whose threads would outlive the interpreter."""
        import torch.distributed as dist

        dist.destroy_process_group()

    def _broadcast(self, task: Task | None) -> Task | None:
        import torch.distributed as dist

        told = [task]
        dist.broadcast_object_list(told, src=0, group=self._group)
        return told[0]
