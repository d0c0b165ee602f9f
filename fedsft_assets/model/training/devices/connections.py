"""Who the devices of a site are connected with: processes of their own account, or they must not go on.

PyTorch's gloo listens on a port of the loopback interface, and takes whoever comes first for the process that it waits
for: there is no key. Before anything is sent, the kernel is asked who came. Linux only; elsewhere nobody can say.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from fedsft_assets.model.errors import ModelError

_TABLES = ("/proc/self/net/tcp", "/proc/self/net/tcp6")
_OPEN = {"01", "08"}  # established, and those of which the other end has said its last


@dataclass(frozen=True)
class _Row:
    """One end of a connection; `inode` is 0 of one that nobody has any more."""

    local: str
    remote: str
    state: str
    user: int
    inode: int


def require_own_connections() -> None:
    """Raises ModelError if another account of this machine is at the other end of one of this process's connections."""
    rows = _rows()
    own = _own_inodes()
    ends = {(row.local, row.remote): row for row in rows}
    for row in rows:
        other = ends.get((row.remote, row.local))
        if row.inode not in own or row.state not in _OPEN or other is None or other.inode == 0:
            continue
        if other.user != os.geteuid():
            raise ModelError(
                f"user {other.user} of this machine has connected in place of one of this site's devices, which are"
                f" processes of user {os.geteuid()}; find out what that user runs, and start the job again"
            )


def _rows() -> list[_Row]:
    rows = []
    for table in map(Path, _TABLES):
        if table.exists():
            for line in table.read_text().splitlines()[1:]:
                _, local, remote, state, _, _, _, user, _, inode, *_ = line.split()
                rows.append(_Row(local, remote, state, int(user), int(inode)))
    return rows


def _own_inodes() -> set[int]:
    """Of the sockets that this process has."""
    found = set()
    descriptors = Path("/proc/self/fd")
    for descriptor in descriptors.iterdir() if descriptors.is_dir() else ():
        try:
            target = os.readlink(descriptor)  # noqa: PTH115 it is no path
        except OSError:  # the one by which the folder is read
            continue
        if target.startswith("socket:["):
            found.add(int(target[8:-1]))
    return found
