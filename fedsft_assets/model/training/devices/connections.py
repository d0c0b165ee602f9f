"""Check that a site's devices are connected only to processes of the same user account.

PyTorch's gloo listens on a loopback port, and accepts the first connection as its peer, without authentication. Before
anything is sent, the peers' user ids are looked up in the kernel's tables. Linux only; there is no check elsewhere.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from fedsft_assets.model.errors import ModelError

_TABLES = ("/proc/self/net/tcp", "/proc/self/net/tcp6")
_OPEN = {"01", "08"}  # ESTABLISHED, CLOSE_WAIT


@dataclass(frozen=True)
class _Row:
    """One end of a connection; `inode` is 0 if no process holds it any more."""

    local: str
    remote: str
    state: str
    user: int
    inode: int


def require_own_connections() -> None:
    """Raise ModelError if a local process of another user is the peer of one of this process's connections."""
    rows = _rows()
    own = _own_inodes()
    ends = {(row.local, row.remote): row for row in rows}
    for row in rows:
        other = ends.get((row.remote, row.local))
        if row.inode not in own or row.state not in _OPEN or other is None or other.inode == 0:
            continue
        if other.user != os.geteuid():
            raise ModelError(
                f"user {other.user} of this machine has connected in place of one of this site's devices, which run"
                f" as user {os.geteuid()}; find out what that user runs, and start the job again"
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
    """The inodes of this process's sockets."""
    found = set()
    descriptors = Path("/proc/self/fd")
    for descriptor in descriptors.iterdir() if descriptors.is_dir() else ():
        try:
            target = os.readlink(descriptor)  # noqa: PTH115 the target is not a path
        except OSError:  # the descriptor of this listing, closed by now
            continue
        if target.startswith("socket:["):
            found.add(int(target[8:-1]))
    return found
