"""Which sites can be reached while a job runs, and whether they still run their part of it; asked of the sites.

NVFlare's server is not asked: it lists a site for minutes after it is gone, and once a site that was started again has
registered it does not notice that the site's part of a job is gone. Nor does it ever give a running job to a site that
comes later, so whoever uses this has to have the job submitted again.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from enum import Enum
from typing import Any

_SECONDS_BETWEEN_LOOKS = 3.0
_SECONDS_TO_ANSWER = 2.0
_SECONDS_TO_TELL = 20.0  # a link may fail for a moment, which is nothing to tell
_SECONDS_TO_START = 180.0  # for the process of a site's part of the job to be there
# NVFlare's own question to a cell, which any cell answers: with which others it is connected.
_CHANNEL, _PEERS = "_net_manager", "peers"

_logger = logging.getLogger(__name__)


class Part(Enum):
    """How a site is found."""

    RUNS = "it runs its part of the job"
    GONE = "it is there, and its part of the job is not"
    AWAY = "it cannot be reached"


class Presence:
    """What is known of each site of a job, from looks at all of them.

    `participants` were given the job when it began; the others get it when it is submitted again. Of these, one in
    `refused` was there when it was submitted for its sake, and did not get it: it has to go away and come again.
    """

    def __init__(self, sites: Iterable[str], participants: Collection[str], refused: Collection[str] = ()) -> None:
        self._sites, self._participants = sorted(sites), frozenset(participants)
        self._lock = threading.Lock()
        self._begun = time.monotonic()
        self._running: set[str] = set()  # they have been seen to run their part
        self._away: dict[str, float] = {}  # since when
        self._told_away: set[str] = set()
        self._suspected: set[str] = set()  # the last look did not find their part
        self._lost: set[str] = set()
        self._waiting = set(self._sites) - self._participants - set(refused)  # they may come any time
        self._returned: set[str] = set()
        self._without_part: set[str] = set()  # at the last look

    def take(self, look: Mapping[str, Part]) -> tuple[list[str], list[str]]:
        """One look at all sites. Returns what to tell, and the participants that have just lost their part."""
        told: list[str] = []
        lost: list[str] = []
        with self._lock:
            self._without_part = {site for site in self._participants if look[site] is not Part.RUNS}
            for site in self._sites:
                if look[site] is Part.AWAY:
                    told += self._not_reached(site)
                    continue
                self._away.pop(site, None)
                if site in self._told_away:
                    self._told_away.discard(site)
                    told += [f"{site} · connected again"] if look[site] is Part.RUNS else []
                if look[site] is Part.RUNS:
                    self._running.add(site)
                    self._suspected.discard(site)
                elif site not in self._participants:
                    told += self._comes(site, "is connected now")
                elif site not in self._lost and self._has_lost_its_part(site):
                    lost.append(site)
                    self._lost.add(site)
                    told += self._comes(site, "was started again, and its part of the job is gone")
        return told, lost

    @property
    def may_return(self) -> bool:
        """Whether a participant does not run its part, or did not at the last look."""
        with self._lock:
            return bool(self._without_part)

    @property
    def returned(self) -> list[str]:
        """Sites that are there and would get the job if it was submitted again."""
        with self._lock:
            return sorted(self._returned)

    def _not_reached(self, site: str) -> list[str]:
        since = self._away.setdefault(site, time.monotonic())
        self._returned.discard(site)
        self._suspected.discard(site)
        if site not in self._participants or site in self._lost:
            self._waiting.add(site)
            return []
        if site in self._told_away or time.monotonic() - since < _SECONDS_TO_TELL:
            return []
        self._told_away.add(site)
        return [f"{site} · cannot be reached for {time.monotonic() - since:.0f} s"]

    def _has_lost_its_part(self, site: str) -> bool:
        """Two looks must say so: a process that ends has told the server before, or is about to."""
        if site not in self._running and time.monotonic() - self._begun < _SECONDS_TO_START:
            return False
        self._waiting.add(site)
        if site in self._suspected:
            return True
        self._suspected.add(site)
        return False

    def _comes(self, site: str, how: str) -> list[str]:
        if site not in self._waiting:
            return []
        self._waiting.discard(site)
        self._returned.add(site)
        return [f"{site} · {how}; it takes part from the next round on"]


class PresenceWatch:
    """A thread that looks at all sites from time to time until it is stopped, and hands on what it finds."""

    def __init__(self, look: Callable[[], Mapping[str, Part]], found: Callable[[Mapping[str, Part]], None]) -> None:
        self._look, self._found = look, found
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Returns when nothing is told any more."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(_SECONDS_BETWEEN_LOOKS):
            try:
                look = self._look()
                if not self._stopped.is_set():
                    self._found(look)
            except Exception:  # whatever it is, the next look may be better, and the job needs none of them
                _logger.exception("cannot look at the sites")


def look_at(cell: Any, sites: Collection[str], job_id: str) -> dict[str, Part]:
    """How the sites are, by NVFlare's cell of the server's part of the job."""
    from nvflare.fuel.f3.cellnet.core_cell import Message
    from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode

    replies = cell.core_cell.broadcast_request(  # the cell itself would send a stream, which is no question to NetAgent
        channel=_CHANNEL,
        topic=_PEERS,
        targets=sorted(sites),
        request=Message(),
        timeout=_SECONDS_TO_ANSWER,
        optional=True,
    )

    def found(site: str) -> Part:
        reply = replies.get(site)
        if reply is None or reply.get_header(MessageHeaderKey.RETURN_CODE) != ReturnCode.OK:
            return Part.AWAY
        if not isinstance(reply.payload, list):  # it is what a site sends
            return Part.AWAY
        return Part.RUNS if f"{site}.{job_id}" in reply.payload else Part.GONE

    return {site: found(site) for site in sites}
