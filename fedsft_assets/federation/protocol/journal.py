"""What happens in a job, in the order in which it does: one JSON object a line, in a file that outlives any process.

Written by the server part of a job, read by whoever watches it.
"""

import json
import os
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedsft_assets.federation.protocol.points import Point
from fedsft_assets.federation.protocol.tail import whole_lines

JOURNAL_FILE = "journal.jsonl"
_AT_MOST = 1 << 20  # bytes of one answer


@dataclass(frozen=True)
class Progress:
    """Something to tell a person who watches."""

    text: str


@dataclass(frozen=True)
class Missed:
    """A site without a result in a round (1-based). `failure` is its trainer's own traceback, if it could say it."""

    site: str
    round: int
    reason: str
    failure: str | None = None


@dataclass(frozen=True)
class RoundDone:
    """A round (1-based) whose global model is on the server's disk: from here on nothing before it can be lost."""

    round: int


@dataclass(frozen=True)
class Started:
    """A server begins, or goes on, after `finished` rounds.

    The last of them has no `RoundDone` where a server died right after it had saved the round.
    """

    finished: int


@dataclass(frozen=True)
class Stopped:
    """The server ends the job before its end; `lost_sites` means that too few sites were left."""

    reason: str
    lost_sites: bool = False


@dataclass(frozen=True)
class Regroup:
    """The server ends the job so that it is submitted again: these sites are there, and NVFlare gives a running job to
    nobody who comes later.
    """

    sites: list[str]


@dataclass(frozen=True)
class Finished:
    """All that the job was for is in its folder at the server."""


class EntryError(ValueError):
    """A line of a journal that is no entry; the message is for the user."""


Entry = Point | Progress | Missed | RoundDone | Started | Stopped | Regroup | Finished
_KINDS: dict[str, type[Any]] = {
    "point": Point,
    "progress": Progress,
    "missed": Missed,
    "round": RoundDone,
    "started": Started,
    "stopped": Stopped,
    "regroup": Regroup,
    "finished": Finished,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def to_line(entry: Entry) -> str:
    return json.dumps({"entry": _NAMES[type(entry)], **asdict(entry)}) + "\n"


def from_line(line: str) -> Entry:
    """Raises EntryError for a line that is no entry."""
    try:
        data = json.loads(line)
        entry: Entry = _KINDS[data.pop("entry")](**data)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise EntryError(f"expected an entry of a job's journal, found {line!r}") from error
    return entry


class Journal:
    """Appends entries; those of a point that is there already are left out, so a round may be done twice.

    What a process that died left of a line is removed.
    """

    def __init__(self, path: Path) -> None:
        """Raises EntryError that names file and line."""
        self.path = path
        self._lock = threading.Lock()
        self._known: set[tuple[Any, ...]] = set()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            file.seek(0)
            content = whole_lines(file.read())
            file.truncate(len(content))
        for number, line in enumerate(content.decode(errors="replace").splitlines(), start=1):
            try:
                entry = from_line(line)
            except EntryError as error:
                raise EntryError(f"{path}, line {number}: {error}; remove the file and run the job again") from error
            if isinstance(entry, Point):
                self._known.add(entry.identity)

    def add(self, entries: Iterable[Entry], durable: bool = True) -> None:
        """Append what is new; with `durable`, wait until it is on the disk. All is there, or OSError and nothing."""
        with self._lock:
            fresh: set[tuple[Any, ...]] = set()
            lines = []
            for entry in entries:
                if isinstance(entry, Point):
                    if entry.identity in self._known or entry.identity in fresh:
                        continue
                    fresh.add(entry.identity)
                lines.append(to_line(entry))
            content = "".join(lines).encode()
            with self.path.open("r+b") as file:
                before = file.seek(0, os.SEEK_END)
                try:
                    file.write(bytes(len(content)))  # room first: a reader must see no line that is taken back
                    file.flush()
                    file.seek(before)
                    file.write(content)
                    file.flush()
                    if durable:
                        os.fsync(file.fileno())
                except OSError:
                    os.truncate(self.path, before)
                    raise
            self._known |= fresh

    def read(self, offset: int) -> tuple[str, int]:
        """Whole lines from a byte on, some 1 MB at most, and the byte that the next call goes on at.

        One line may be longer.
        """
        with self.path.open("rb") as file:
            file.seek(offset)
            content = file.read(_AT_MOST)
            if b"\n" not in content:
                content += file.readline()
        whole = whole_lines(content)
        return whole.decode(), offset + len(whole)
