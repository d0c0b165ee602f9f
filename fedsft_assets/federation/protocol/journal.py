"""The journal of a job: its events in order, one JSON object per line, in a file that survives any process.

Written by the job's server process, read by the operator.
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
_AT_MOST = 1 << 20  # bytes per read


@dataclass(frozen=True)
class Progress:
    """A message for the user."""

    text: str


@dataclass(frozen=True)
class Missed:
    """A site without a result in a round (1-based). `failure` is its trainer's traceback, if it sent one."""

    site: str
    round: int
    reason: str
    failure: str | None = None


@dataclass(frozen=True)
class RoundDone:
    """A round (1-based) whose global model is saved at the server: it is final."""

    round: int


@dataclass(frozen=True)
class Started:
    """The server started, or resumed, after `finished` rounds.

    The last of them has no `RoundDone` if the server died right after saving it.
    """

    finished: int


@dataclass(frozen=True)
class Stopped:
    """The server stopped the job early; `lost_sites` means that too few sites were left."""

    reason: str
    lost_sites: bool = False


@dataclass(frozen=True)
class Regroup:
    """The server ended the job to be resubmitted, so that `sites`, which connected later, can join."""

    sites: list[str]


@dataclass(frozen=True)
class Finished:
    """The job's results are complete in its folder at the server."""


class EntryError(ValueError):
    """A journal line is not a valid entry; the message is for the user."""


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
    """Raises EntryError if the line is not an entry."""
    try:
        data = json.loads(line)
        entry: Entry = _KINDS[data.pop("entry")](**data)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise EntryError(f"expected an entry of a job's journal, found {line!r}") from error
    return entry


class Journal:
    """Appends entries, skipping points that it already has, so a round may be repeated.

    An incomplete last line, left by a killed process, is removed.
    """

    def __init__(self, path: Path) -> None:
        """Raises EntryError naming file and line."""
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
        """Append new entries, all or none; with `durable`, wait until they are on disk. Raises OSError."""
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
                    file.write(
                        bytes(len(content))
                    )  # reserve space first: readers must never see a line that is rolled back
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
        """Complete lines from a byte offset on, about 1 MB at most, and the offset for the next call.

        A single line may be longer.
        """
        with self.path.open("rb") as file:
            file.seek(offset)
            content = file.read(_AT_MOST)
            if b"\n" not in content:
                content += file.readline()
        whole = whole_lines(content)
        return whole.decode(), offset + len(whole)
