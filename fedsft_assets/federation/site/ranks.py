"""Several devices at a site: one process (rank) each; only rank 0 talks to NVFlare, and the others follow it.

Everything stays on this machine: ranks rendezvous and communicate through files; tensors go over the loopback
interface, between processes of this account only.
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

# A site waits for the other sites, whose rounds may take days.
_LONGEST_WAIT = timedelta(days=365)


class Task(NamedTuple):
    """The next task of all ranks, with the weights that rank 0 received."""

    kind: Literal["train", "evaluate"]
    round: int


def start_all(devices: int, folder: Path) -> None:
    """Replace this process with torchrun, which runs the same command once per device; returns only in those.

    `folder` is for short-lived rendezvous files and torchrun's logs.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return
    from fedsft_assets.model.training.devices.interface import MEETING_FILE

    meeting = folder.absolute() / f"devices-{uuid4().hex}"
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)  # of the whole site
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(max(1, threads // devices)),
        MEETING_FILE: str(meeting),
        "GLOO_SOCKET_IFNAME": loopback,
        "NCCL_SOCKET_IFNAME": loopback,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # would listen on all interfaces
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
    """Broadcast the result of `say` at rank 0 to all ranks of this site; the others wait for it.

    Each `name` can be used once. Uses the file named by `MEETING_FILE`; requires no process group.
    """
    import torch.distributed as dist

    from fedsft_assets.model.training.devices.interface import MEETING_FILE

    store = dist.FileStore(f"{os.environ[MEETING_FILE]}-{name}", int(os.environ["WORLD_SIZE"]))
    store.set_timeout(_LONGEST_WAIT)
    if os.environ["RANK"] == "0":
        store.set(name, say())
    return store.get(name).decode()


class Followers:
    """Passes tasks from rank 0 to the other ranks of a site."""

    def __init__(self) -> None:
        """Requires an initialized process group and `MEETING_FILE`."""
        import torch.distributed as dist

        from fedsft_assets.model.training.devices.interface import MEETING_FILE

        # Waiting in the training process group would keep GPUs busy, and time out after minutes.
        self._store = dist.FileStore(f"{os.environ[MEETING_FILE]}-tasks", dist.get_world_size())
        self._store.set_timeout(_LONGEST_WAIT)
        self._count = 0

    def tell(self, task: Task | None) -> None:
        """Rank 0: announce the next task, or None to finish."""
        self._store.set(self._next(), json.dumps(task))

    def tasks(self) -> Iterator[Task]:
        """Other ranks: yield rank 0's tasks until it finishes."""
        while task := json.loads(self._store.get(self._next())):
            yield Task(*task)

    def part(self) -> None:
        """All ranks: destroy the process group at the end, whose threads would outlive the interpreter."""
        import torch.distributed as dist

        dist.destroy_process_group()

    def _next(self) -> str:
        self._count += 1
        return f"task {self._count}"
