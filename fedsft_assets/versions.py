"""Versions of what a study is made of: each content in a folder of its own, named by its digest, that never changes.

`processed/dolly/` has one folder for each version of that dataset's splits, and the link `current`, which names the one
that is used where nothing else is said. Whoever works on a version holds its own path, never that of the link, so
what others make current meanwhile changes nothing for it. Paths inside a home are named relative to it: a home can be
moved.
"""

import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fedsft_assets.files import (
    folder_digest,
    fsync,
    fsync_tree,
    link_or_copy,
    locked,
    own_folder,
    publish_file,
    remove_left,
)

CURRENT = "current"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_VERDICT = ".checks.json"


class NoVersionError(FileNotFoundError):
    """There is no such version; the message says what to do."""

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass
class Addition:
    """A new version: what is written into `folder` is found at `version` when all of it is there."""

    folder: Path
    version: Path = field(default_factory=Path)


@contextmanager
def adding(versions: Path) -> Iterator[Addition]:
    """Yield an empty folder to be filled; when the block ends well, it is a version of `versions`, whole.

    A content that is there already stays as it is. If the block raises, nothing is left of the new one.
    """
    place = versions / "version"
    versions.mkdir(parents=True, exist_ok=True)
    remove_left(place)
    with _without_empty(versions), own_folder(place) as fresh:
        folder = fresh / "new" / "content"  # what is published into it locks the folder around it, and this one is ours
        folder.mkdir(parents=True)
        addition = Addition(folder)
        yield addition
        version = versions / folder_digest(folder)
        fsync_tree(folder)
        with locked(versions):
            if version.exists():
                os.utime(version)  # nobody removes what has been made again just now
            else:
                folder.rename(version)
                fsync(versions)
        addition.version = version


@contextmanager
def _without_empty(versions: Path) -> Iterator[None]:
    """A folder of versions that never got one is of no use."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            versions.rmdir()
        raise


def add_version(versions: Path, source: Path) -> Path:
    """Make the files of a folder a version, without a copy where both are on one disk; returns it."""
    with adding(versions) as addition:
        shutil.copytree(source, addition.folder, copy_function=link_or_copy, dirs_exist_ok=True)
    return addition.version


def current(versions: Path) -> Path:
    """The version that is used where nothing else is said. Raises NoVersionError."""
    link = versions / CURRENT
    try:
        return existing(versions / link.readlink())
    except FileNotFoundError:
        raise NoVersionError(f"{versions}: has no current version; materialize its asset first") from None
    except OSError:
        raise NoVersionError(
            f"{link}: is no link to a version; was the home copied without links? Remove it, and materialize the asset"
        ) from None


def existing(version: Path) -> Path:
    """The version itself. Raises NoVersionError if it is not there, or no longer."""
    if not version.is_dir():
        raise NoVersionError(
            f"{version}: is not there; it may have been removed by `fedsft prune`: materialize its asset again"
        )
    return version


def short(version: Path) -> Path:
    """A path of the version that a person can read: by `current`, as long as that names it."""
    link = version.parent / CURRENT
    return link if link.is_symlink() and link.readlink() == Path(version.name) else version


def title(folder: Path) -> str:
    """The name of what a folder is a version of; of any other folder, its own."""
    return folder.parent.name if _DIGEST.fullmatch(folder.name) else folder.name


def make_current(version: Path) -> None:
    """Use this version where nothing else is said, from now on."""
    existing(version)
    link = version.parent / CURRENT
    fresh = link.with_name(f".{CURRENT}.{uuid.uuid4().hex}")
    fresh.symlink_to(version.name)
    os.replace(fresh, link)
    fsync(link.parent)


def remove_version(version: Path) -> None:
    """Remove a version with its verdict; whoever calls this holds the lock of the folder around it."""
    doomed = version.with_name(f".{version.name}.old")
    version.rename(doomed)  # at once: a version is there whole, or not at all
    shutil.rmtree(doomed)
    _verdict_file(version).unlink(missing_ok=True)


def versions_of(folder: Path) -> list[Path]:
    """All versions in a folder of versions, the latest first."""
    found = [path for path in folder.iterdir() if _DIGEST.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


@dataclass(frozen=True)
class Verdict:
    """What the checks of a version found, by the name of each that failed as an error.

    `accepted` are those that a person has accepted nevertheless, `by` whom, and `at` when the verdict was given, in
    seconds since the epoch.
    """

    failed: dict[str, str] = field(default_factory=dict)
    accepted: list[str] = field(default_factory=list)
    by: str = ""
    at: float = field(default_factory=time.time)

    @property
    def refused(self) -> list[str]:
        """The checks for which it may not be used."""
        return sorted(set(self.failed) - set(self.accepted))


def read_verdict(version: Path) -> Verdict | None:
    """What its checks found the last time; None if they never ran to their end."""
    try:
        return Verdict(**json.loads(_verdict_file(version).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def judge(version: Path, verdict: Verdict) -> None:
    """Write down what the checks found, and make the version current if nothing stands against it."""
    with publish_file(_verdict_file(version)) as path:
        path.write_text(json.dumps(asdict(verdict), indent=2) + "\n", encoding="utf-8")
    if not verdict.refused:
        make_current(version)


def accepted(version: Path) -> Path:
    """The version, if it may be trained on. Raises NoVersionError that names the checks that say no."""
    verdict = read_verdict(existing(version))
    if verdict is None:
        raise NoVersionError(f"{version}: its checks have not run; run them, or materialize the asset with its checks")
    if verdict.refused:
        found = "; ".join(f"{name}: {verdict.failed[name]}" for name in verdict.refused)
        raise NoVersionError(
            f"{version}: is refused by its checks ({found}); repair the data, or accept it:"
            f" fedsft accept {version.parent.name} {' '.join(verdict.refused)}"
        )
    return version


def accept(versions: Path, checks: Sequence[str], by: str) -> Path:
    """Accept the version that was refused last in spite of these checks, and make it current; returns it.

    Raises NoVersionError if there is none, or it is refused by other checks too.
    """
    judged = [(verdict, version) for version in versions_of(versions) if (verdict := read_verdict(version))]
    refused = [one for one in judged if one[0].refused]
    if not refused:
        raise NoVersionError(f"{versions}: no version is refused by its checks")
    verdict, version = max(refused, key=lambda one: one[0].at)
    unknown = sorted(set(checks) - set(verdict.failed))
    left = sorted(set(verdict.refused) - set(checks))
    if unknown or left:
        raise NoVersionError(
            f"{version}: is refused by {', '.join(verdict.refused)}, not by {', '.join(checks)}; name all of them"
        )
    judge(version, Verdict(verdict.failed, sorted({*verdict.accepted, *checks}), by))
    return version


def _verdict_file(version: Path) -> Path:
    return version.with_name(f"{version.name}{_VERDICT}")
