"""The history of one execution: the local copy of its server's journal, and what follows from it.

A history is one unbroken chain of server states. A restarted server continues it; a server that has lost a finished
round starts a new history, which is never mixed up with this one.
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
    """The server has lost finished rounds, so it is now on a different history.

    `begun` is the maximum number of rounds per site in that other history, according to its journal so far.
    """

    def __init__(self, why: str, lines: list[str]) -> None:
        super().__init__(why)
        self.begun = rounds_begun(lines)


def rounds_begun(lines: list[str]) -> int:
    """Upper bound on the rounds in a journal: finished ones, and one interrupted round per server start."""
    return sum(isinstance(from_line(line), RoundDone | Started) for line in lines)


class History:
    """The history in the local copy `journal`, which later attempts continue."""

    def __init__(self, journal: Path, all_rounds: int, rounds: int = 0) -> None:
        """At least `rounds` rounds are finished, whatever the copy says. Raises EntryError if the copy is damaged."""
        self._journal = Journal(journal)
        self._all_rounds = all_rounds
        self.points: dict[tuple[object, ...], Point] = {}
        self.missed: list[Missed] = []
        self.rounds = 0
        self.stopped: Stopped | None = None
        """The final entry of the current FLARE job, if it stopped."""
        self.regroup: Regroup | None = None
        """The final entry of the current FLARE job, if it ended to be resubmitted."""
        self.finished = False
        """Whether the current FLARE job has completed all of its work."""
        self._rounds_done, self._cut_off, self._under_way = 0, 0, False
        for line in self._copy():
            deque(self._take(from_line(line)), maxlen=0)
        self.rounds = max(rounds, self.rounds)
        self.stopped = self.regroup = None
        self._known = self._copy()

    @property
    def releases(self) -> int:
        """Upper bound on the changes each site has released: one per finished round and one per interrupted round."""
        return self._rounds_done + self._cut_off + self._in_a_round

    @property
    def releases_to_come(self) -> int:
        """Number of releases still to come if no round is interrupted."""
        return self._all_rounds - self.rounds - self._in_a_round

    @property
    def said_all(self) -> bool:
        """Whether the current FLARE job has written its final entry."""
        return self.finished or self.stopped is not None

    def begin_job(self) -> None:
        """Start following another FLARE job, whose journal starts with the entries of the previous one."""
        self.stopped, self.regroup, self.finished = None, None, False
        self._known = self._copy()

    def take(self, lines: list[str]) -> Iterator[Event]:
        """Yield the new events in these lines of the server's journal, which have not been read before.

        Raises BrokenChainError before any entry of another history is taken.
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
        """Whether a round is in progress, as far as is known."""
        return self._under_way and self.rounds < self._all_rounds

    def _copy(self) -> deque[str]:
        return deque(self._journal.path.read_text(encoding="utf-8").splitlines())

    def _fresh(self, lines: list[str]) -> list[str]:
        """The lines that are not yet in the copy, which is a prefix of the server's journal.

        A power failure may lose the end of the server's journal, but never a finished round.
        """
        for number, line in enumerate(lines):
            if not self._known:
                return lines[number:]
            if self._known[0] != line:
                if any(isinstance(from_line(known), RoundDone | Finished) for known in self._known):
                    why = "its server started over: the finished rounds are gone"
                    raise BrokenChainError(why, lines)
                self._known.clear()
                return lines[number:]
            self._known.popleft()
        return []
