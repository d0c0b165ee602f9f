"""Who may read what is written: the account that owns it, and no other.

What this package writes is so from the beginning, by the umask that its import sets. This closes what others have made,
or an earlier version: it never follows links, and leaves alone what belongs to somebody else.
"""

import errno
import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

OTHERS = stat.S_IRWXG | stat.S_IRWXO
_MAY_READ = stat.S_IRGRP | stat.S_IROTH
_MAY_ENTER = stat.S_IXGRP | stat.S_IXOTH
_KEYS = (".key", ".p12", ".pfx")
_AUTHORITY = "cert.json"  # in which NVFlare's provisioning keeps the authority's private key, and everybody else's


@dataclass
class Closed:
    """What was open: so many files and folders, and which private keys among them others could have read.

    `refused` is why the first one could not be closed that was not, with its path.
    """

    count: int = 0
    keys: list[Path] = field(default_factory=list)
    refused: str | None = None


def is_open(path: Path) -> bool:
    """Whether others may do anything with a file or folder of this account's, as far as its own mode says."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return _is_ours(found) and bool(found.st_mode & OTHERS)


def close_to_others(path: Path, parts: Collection[str] | None = None) -> Closed:
    """Close a file, or a folder with all that is in it. What disappears meanwhile is of no interest.

    `parts` are the only folders in it that are looked into, for a folder that its user may have for other things too.
    """
    closed = Closed()
    for one, found, in_reach in _walk(path, True, parts):
        if not found.st_mode & OTHERS:
            continue
        try:
            one.chmod(stat.S_IMODE(found.st_mode) & ~OTHERS)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno == errno.EROFS:  # nothing can be done there at all, which its user is told elsewhere
                continue
            closed.refused = closed.refused or f"{one}: {error.strerror}"
            continue
        closed.count += 1
        if in_reach and found.st_mode & _MAY_READ and _is_key(one):
            closed.keys.append(one)
    return closed


def close_kit(kit: Path) -> str | None:
    """Close a startup kit; one line for whoever is responsible for it if it was open."""
    closed = close_to_others(kit.resolve())
    return said_of_kit(kit, closed) if closed.count else None


def said_of_kit(kit: Path, closed: Closed) -> str:
    """One line for whoever is responsible for a startup kit that was open."""
    said = f"{kit}: this startup kit was open to other accounts of this computer; no longer"
    names = ", ".join(path.name for path in closed.keys)
    return f"{said}. Whoever has read {names} can act in its name: have it provisioned anew" if names else said


def _walk(
    path: Path, in_reach: bool, parts: Collection[str] | None = None
) -> Iterator[tuple[Path, os.stat_result, bool]]:
    """What is there and this account's, a folder before what is in it; and whether others could come so far."""
    try:
        found = path.lstat()
    except OSError:
        return
    if not _is_ours(found):
        return
    yield path, found, in_reach
    if stat.S_ISDIR(found.st_mode):
        in_reach = in_reach and bool(found.st_mode & _MAY_ENTER)
        try:
            inside = list(path.iterdir())
        except OSError:  # gone, or closed to its owner too
            return
        for one in inside:
            if parts is None or one.name in parts or not one.is_dir():
                yield from _walk(one, in_reach)


def _is_ours(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid() and not stat.S_ISLNK(found.st_mode)


def _is_key(path: Path) -> bool:
    return path.suffix in _KEYS or path.name == _AUTHORITY
