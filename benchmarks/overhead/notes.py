"""What a contender of the overhead benchmark notes while it works: what it trained and scored, and when.

One JSON object a line, appended to one file by all of a contender's processes.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

NOTES = "OVERHEAD_NOTES"  # the file's path, in the environment of every process of a contender


@dataclass(frozen=True)
class Trained:
    """A site's training in a round (0-based). `tokens` are answer tokens, times seconds since the epoch."""

    site: str
    round: int
    steps: int
    tokens: int
    begun: float
    ended: float


@dataclass(frozen=True)
class Scored:
    """The mean loss over `tokens` answer tokens of the global model after so many rounds, at a site."""

    site: str
    round: int
    loss: float
    tokens: int


Note = Trained | Scored
_KINDS: dict[str, type[Trained] | type[Scored]] = {"trained": Trained, "scored": Scored}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def note(one: Note, path: Path | None = None) -> None:
    """Append a note to the file that the environment names, unless it is told one."""
    line = json.dumps({"note": _NAMES[type(one)], **asdict(one)}) + "\n"
    with (path or Path(os.environ[NOTES])).open("a", encoding="utf-8") as file:
        file.write(line)


def read_notes(path: Path) -> list[Note]:
    """All notes, in the order of the file."""
    notes = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [_KINDS[one.pop("note")](**one) for one in notes]
