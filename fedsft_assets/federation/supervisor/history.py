"""What one execution has done, by its server's journal: this side's copy of it, and what it says.

A history is one unbroken chain of states at the server. A server that is started again goes on with it; one that has
lost a finished round begins another, which is never taken for this one.
"""

from collections import deque
from collections.abc import Iterator
from pathlib import Path

from fedsft_assets.federation.protocol.events import Event
from fedsft_assets.federation.protocol.journal import (
    Entry,
    Finished,
    Journal,
    Missed,
    Progress,
    Regroup,
    RoundDone,
    Started,
    Stopped,
    from_line,
)
from fedsft_assets.federation.protocol.points import Point


class BrokenChainError(Exception):
    """The server has lost rounds that it had finished: what it does now is another history.

    `begun` are rounds that each site may have done in this other one, by what was read of its journal.
    """

    def __init__(self, why: str, lines: list[str]) -> None:
        super().__init__(why)
        self.begun = rounds_begun(lines)


def rounds_begun(lines: list[str]) -> int:
    """How many rounds a journal knows of at most: those that were done, and one that each server may have cut off."""
    return sum(isinstance(from_line(line), RoundDone | Started) for line in lines)


class History:
    """The copy in the file `journal`, from which a later attempt knows what earlier ones have told."""

    def __init__(self, journal: Path, all_rounds: int, rounds: int = 0) -> None:
        """`rounds` are known to be finished, whatever the copy says. Raises EntryError for a copy that is damaged."""
        self._journal = Journal(journal)
        self._all_rounds = all_rounds
        self.points: dict[tuple[object, ...], Point] = {}
        self.missed: list[Missed] = []
        self.rounds = 0
        self.stopped: Stopped | None = None
        """The last word of the job that is followed, not of one before it."""
        self.regroup: Regroup | None = None
        """The same: it ended so that it is submitted again."""
        self.finished = False
        """Whether the job that is followed has done all that it was for."""
        self._rounds_done, self._cut_off, self._under_way = 0, 0, False
        for line in self._copy():
            deque(self._take(from_line(line)), maxlen=0)
        self.rounds = max(rounds, self.rounds)
        self.stopped = self.regroup = None
        self._known = self._copy()

    @property
    def releases(self) -> int:
        """How many changes each site may have released: one for each round, and one for each that was cut off."""
        return self._rounds_done + self._cut_off + self._in_a_round

    @property
    def releases_to_come(self) -> int:
        """As many as are left to do, if nothing is cut off."""
        return self._all_rounds - self.rounds - self._in_a_round

    @property
    def said_all(self) -> bool:
        """Whether the job that is followed has said its last word."""
        return self.finished or self.stopped is not None

    def begin_job(self) -> None:
        """Another job is to be followed, whose journal begins with what the one before it has written."""
        self.stopped, self.regroup, self.finished = None, None, False
        self._known = self._copy()

    def take(self, lines: list[str]) -> Iterator[Event]:
        """What is new to this side in these lines of the server's journal, of which nothing was taken yet.

        Raises BrokenChainError, before anything of another history is taken.
        """
        entries = [from_line(line) for line in self._fresh(lines)]
        rounds = self.rounds
        for entry in entries:
            if isinstance(entry, Started) and entry.finished < rounds:
                why = f"its server resumed after round {entry.finished}, though it had finished round {rounds}"
                raise BrokenChainError(why, lines)
            rounds = entry.round if isinstance(entry, RoundDone) else rounds
        self._journal.add(entries)
        for entry in entries:
            yield from self._take(entry)

    def _take(self, entry: Entry) -> Iterator[Event]:
        match entry:
            case Point():
                if entry.identity not in self.points:
                    self.points[entry.identity] = entry
                    yield entry
            case Progress():
                yield entry
            case Missed():
                self.missed.append(entry)
                yield entry
            case RoundDone(round):
                self.rounds = round
                self._rounds_done += 1
            case Started(finished):
                self._cut_off += self._in_a_round
                self.rounds, self._under_way = finished, True
                self.missed = [one for one in self.missed if one.round <= finished]
                self.stopped, self.regroup, self.finished = None, None, False
            case Stopped():
                self.stopped = entry
            case Regroup():
                self.regroup = entry
            case Finished():
                self.finished, self._under_way = True, False

    @property
    def _in_a_round(self) -> bool:
        """Whether a round is under way, or was when nothing more was heard."""
        return self._under_way and self.rounds < self._all_rounds

    def _copy(self) -> deque[str]:
        return deque(self._journal.path.read_text(encoding="utf-8").splitlines())

    def _fresh(self, lines: list[str]) -> list[str]:
        """Those of the lines that are not in the copy, which is the beginning of the server's journal.

        A machine that loses its power may lose the end of the journal, but no round that is in it.
        """
        for number, line in enumerate(lines):
            if not self._known:
                return lines[number:]
            if self._known[0] != line:
                if any(isinstance(from_line(known), RoundDone | Finished) for known in self._known):
                    why = "its server has begun anew: the rounds that it had finished are not there"
                    raise BrokenChainError(why, lines)
                self._known.clear()
                return lines[number:]
            self._known.popleft()
        return []
