"""Immutable versions of a study's data and models: each in its own folder, named by its content digest.

`processed/dolly/` has one folder per version of that dataset's splits, and the link `current`, which points to the one
used by default. Code that works on a version holds its own path, never the link, so it is not affected if another
version becomes current. Paths inside a home are stored relative to it, so a home can be moved.
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
    """A new version: the content written to `folder` is published at `version`."""

    folder: Path
    version: Path = field(default_factory=Path)


@contextmanager
def adding(versions: Path) -> Iterator[Addition]:
    """Yield an empty folder to fill; if the block succeeds, it is atomically published as a version in `versions`.

    An existing version with the same content is kept. If the block raises, the folder is removed.
    """
    place = versions / "version"
    versions.mkdir(parents=True, exist_ok=True)
    remove_left(place)
    with _without_empty(versions), own_folder(place) as fresh:
        folder = fresh / "new" / "content"  # publishing into it locks its parent, which is private here
        folder.mkdir(parents=True)
        addition = Addition(folder)
        yield addition
        version = versions / folder_digest(folder)
        fsync_tree(folder)
        with locked(versions):
            if version.exists():
                os.utime(version)  # protects a version that was just recreated from `remove`
            else:
                folder.rename(version)
                fsync(versions)
        addition.version = version


@contextmanager
def _without_empty(versions: Path) -> Iterator[None]:
    """Remove a folder of versions that is still empty after an error."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            versions.rmdir()
        raise


def add_version(versions: Path, source: Path) -> Path:
    """Add a folder's files as a version, hard-linked if possible; returns it."""
    with adding(versions) as addition:
        shutil.copytree(source, addition.folder, copy_function=link_or_copy, dirs_exist_ok=True)
    return addition.version


def current(versions: Path) -> Path:
    """The current version, used by default. Raises NoVersionError."""
    link = versions / CURRENT
    try:
        return existing(versions / link.readlink())
    except FileNotFoundError:
        raise NoVersionError(f"{versions}: has no current version; materialize its asset first") from None
    except OSError:
        raise NoVersionError(
            f"{link}: not a link to a version; was the home copied without links? Remove it, and materialize the asset"
        ) from None


def existing(version: Path) -> Path:
    """The version itself. Raises NoVersionError if it does not exist."""
    if not version.is_dir():
        raise NoVersionError(
            f"{version}: does not exist; it may have been removed by `fedsft prune`: materialize its asset again"
        )
    return version


def short(version: Path) -> Path:
    """A readable path of the version: the link `current` if it points to it."""
    link = version.parent / CURRENT
    return link if link.is_symlink() and link.readlink() == Path(version.name) else version


def title(folder: Path) -> str:
    """The name of the versioned item if the folder is a version, otherwise the folder's own name."""
    return folder.parent.name if _DIGEST.fullmatch(folder.name) else folder.name


def make_current(version: Path) -> None:
    """Make this version the default."""
    existing(version)
    link = version.parent / CURRENT
    fresh = link.with_name(f".{CURRENT}.{uuid.uuid4().hex}")
    fresh.symlink_to(version.name)
    os.replace(fresh, link)
    fsync(link.parent)


def remove_version(version: Path) -> None:
    """Remove a version with its verdict; the caller must hold the lock of its parent folder."""
    doomed = version.with_name(f".{version.name}.old")
    version.rename(doomed)  # atomically: a version is complete or absent
    shutil.rmtree(doomed)
    _verdict_file(version).unlink(missing_ok=True)


def versions_of(folder: Path) -> list[Path]:
    """All versions in a folder of versions, newest first."""
    found = [path for path in folder.iterdir() if _DIGEST.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


@dataclass(frozen=True)
class Verdict:
    """The result of a version's checks: the findings of those that failed as an error, by name.

    `accepted` are failed checks accepted by a user, `by` says by whom, and `at` is the time of the verdict in seconds
    since the epoch.
    """

    failed: dict[str, str] = field(default_factory=dict)
    accepted: list[str] = field(default_factory=list)
    by: str = ""
    at: float = field(default_factory=time.time)

    @property
    def refused(self) -> list[str]:
        """Failed checks that were not accepted."""
        return sorted(set(self.failed) - set(self.accepted))


def read_verdict(version: Path) -> Verdict | None:
    """The latest verdict; None if the checks never completed."""
    try:
        return Verdict(**json.loads(_verdict_file(version).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None


def judge(version: Path, verdict: Verdict) -> None:
    """Record the checks' verdict, and make the version current unless it is refused."""
    with publish_file(_verdict_file(version)) as path:
        path.write_text(json.dumps(asdict(verdict), indent=2) + "\n", encoding="utf-8")
    if not verdict.refused:
        make_current(version)


def accepted(version: Path) -> Path:
    """The version, if it may be trained on. Raises NoVersionError naming the failed checks."""
    verdict = read_verdict(existing(version))
    if verdict is None:
        raise NoVersionError(f"{version}: its checks have not run; run them, or materialize the asset with its checks")
    if verdict.refused:
        found = "; ".join(f"{name}: {verdict.failed[name]}" for name in verdict.refused)
        raise NoVersionError(
            f"{version}: failed its checks ({found}); fix the data, or accept it:"
            f" fedsft accept {version.parent.name} {' '.join(verdict.refused)}"
        )
    return version


def accept(versions: Path, checks: Sequence[str], by: str) -> Path:
    """Accept the most recently refused version despite these failed checks, and make it current; returns it.

    Raises NoVersionError if there is none, or if it failed other checks too.
    """
    judged = [(verdict, version) for version in versions_of(versions) if (verdict := read_verdict(version))]
    refused = [one for one in judged if one[0].refused]
    if not refused:
        raise NoVersionError(f"{versions}: no version has failed its checks")
    verdict, version = max(refused, key=lambda one: one[0].at)
    unknown = sorted(set(checks) - set(verdict.failed))
    left = sorted(set(verdict.refused) - set(checks))
    if unknown or left:
        raise NoVersionError(
            f"{version}: failed {', '.join(verdict.refused)}, not {', '.join(checks)}; name all failed checks"
        )
    judge(version, Verdict(verdict.failed, sorted({*verdict.accepted, *checks}), by))
    return version


def _verdict_file(version: Path) -> Path:
    return version.with_name(f"{version.name}{_VERDICT}")
