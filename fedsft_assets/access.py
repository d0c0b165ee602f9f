"""File permissions: everything written is private to the account that owns it.

New files are private because importing this package sets the umask. This module closes files made by other programs or
earlier versions. It never follows links, and does not touch files of other accounts.
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
_AUTHORITY = "cert.json"  # where NVFlare's provisioning keeps all private keys, including the authority's


@dataclass
class Closed:
    """The result of closing: number of open files and folders, and private keys that others could have read.

    `refused` is the path of the first one that could not be closed, and the reason.
    """

    count: int = 0
    keys: list[Path] = field(default_factory=list)
    refused: str | None = None


def is_open(path: Path) -> bool:
    """Whether the mode of a file or folder of this account gives others any access."""
    try:
        found = path.lstat()
    except OSError:
        return False
    return _is_ours(found) and bool(found.st_mode & OTHERS)


def close_to_others(path: Path, parts: Collection[str] | None = None) -> Closed:
    """Close a file, or a folder with all its content. Files that disappear meanwhile are ignored.

    `parts` limits the subfolders to close, for a folder that may also have other content.
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
            if error.errno == errno.EROFS:  # read-only file system: reported elsewhere
                continue
            closed.refused = closed.refused or f"{one}: {error.strerror}"
            continue
        closed.count += 1
        if in_reach and found.st_mode & _MAY_READ and _is_key(one):
            closed.keys.append(one)
    return closed


def close_kit(kit: Path) -> str | None:
    """Close a startup kit; returns a one-line warning if it was open."""
    closed = close_to_others(kit.resolve())
    return said_of_kit(kit, closed) if closed.count else None


def said_of_kit(kit: Path, closed: Closed) -> str:
    """One-line warning about a startup kit that was open."""
    warning = f"{kit}: this startup kit was open to other accounts of this computer; access removed"
    names = ", ".join(path.name for path in closed.keys)
    return f"{warning}. Anyone who has read {names} can impersonate it: have it provisioned again" if names else warning


def _walk(
    path: Path, in_reach: bool, parts: Collection[str] | None = None
) -> Iterator[tuple[Path, os.stat_result, bool]]:
    """Files of this account, folders before their content, and whether others could reach them."""
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
        except OSError:  # gone, or unreadable for its owner too
            return
        for one in inside:
            if parts is None or one.name in parts or not one.is_dir():
                yield from _walk(one, in_reach)


def _is_ours(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid() and not stat.S_ISLNK(found.st_mode)


def _is_key(path: Path) -> bool:
    return path.suffix in _KEYS or path.name == _AUTHORITY
