"""More than one device at a site: a process each, of which rank 0 alone talks to NVFlare and the others follow it.

Everything stays on this machine: processes find each other, and follow, through files of their own; tensors go over the
loopback interface, between processes of this account alone.
"""

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
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
    from fedsft_assets.model.training.devices.interface import MEETING_FILE

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
        *("-m", "fedsft_assets.federation.site.process", *sys.argv[1:]),
    ]
    sys.stdout.flush()
    os.execve(sys.executable, command, environment)


def word_of_rank_0(name: str, say: Callable[[], str]) -> str:
    """What `say` gives at rank 0, for all processes that torchrun started at this site; the others wait for it.

    Each name is for one word. Processes meet where `MEETING_FILE` says, and need no group for it.
    """
    import torch.distributed as dist

    from fedsft_assets.model.training.devices.interface import MEETING_FILE

    store = dist.FileStore(f"{os.environ[MEETING_FILE]}-{name}", int(os.environ["WORLD_SIZE"]))
    store.set_timeout(_LONGEST_WAIT)
    if os.environ["RANK"] == "0":
        store.set(name, say())
    return store.get(name).decode()


class Followers:
    """The other ranks, as rank 0 sees them, and rank 0, as they see it."""

    def __init__(self) -> None:
        """Of a process that has joined the others, and met them where `MEETING_FILE` says."""
        import torch.distributed as dist

        from fedsft_assets.model.training.devices.interface import MEETING_FILE

        # Waiting in the group that trains would keep GPUs busy, and end after minutes.
        self._store = dist.FileStore(f"{os.environ[MEETING_FILE]}-tasks", dist.get_world_size())
        self._store.set_timeout(_LONGEST_WAIT)
        self._told = 0

    def tell(self, task: Task | None) -> None:
        """Rank 0: what is to be done next, or None if nothing is."""
        self._store.set(self._next(), json.dumps(task))

    def tasks(self) -> Iterator[Task]:
        """Other ranks: what rank 0 tells, until nothing is left to do."""
        while said := json.loads(self._store.get(self._next())):
            yield Task(*said)

    def part(self) -> None:
        """All ranks, when nothing is left to do: leave every group, whose threads would outlive the interpreter."""
        import torch.distributed as dist

        dist.destroy_process_group()

    def _next(self) -> str:
        self._told += 1
        return f"task {self._told}"
