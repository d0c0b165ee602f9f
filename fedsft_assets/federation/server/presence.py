"""Polls the sites for whether they are reachable and still run their part of the job.

NVFlare's server is no substitute: it lists a site for minutes after it is gone, does not notice that a restarted site
has lost its part of a job, and never deploys a running job to a site that connects later. The caller must have the job
resubmitted.
"""

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from enum import Enum
from typing import Any

_SECONDS_TO_ANSWER = 2.0
_SECONDS_TO_TELL = 20.0  # shorter outages are not reported
_SECONDS_TO_START = 180.0  # for a site's job process to appear
# NVFlare's built-in request for the list of cells that a cell is connected to.
_CHANNEL, _PEERS = "_net_manager", "peers"

_logger = logging.getLogger(__name__)


class Part(Enum):
    """The state of a site at one poll."""

    RUNS = "it runs its part of the job"
    GONE = "it is connected, but does not run its part of the job"
    AWAY = "it cannot be reached"


class Presence:
    """Tracks the state of each site of a job over successive polls.

    The job was deployed to `participants` when it started; the other sites get it on resubmission. A site in `refused`
    did not get the job even though it was resubmitted for its sake: it must disconnect and reconnect first.
    """

    def __init__(self, sites: Iterable[str], participants: Collection[str], refused: Collection[str] = ()) -> None:
        self._sites, self._participants = sorted(sites), frozenset(participants)
        self._lock = threading.Lock()
        self._begun = time.monotonic()
        self._running: set[str] = set()  # seen running their part
        self._away: dict[str, float] = {}  # site -> time of the first failed poll
        self._reported_away: set[str] = set()
        self._suspected: set[str] = set()  # part not found at the last poll
        self._lost: set[str] = set()
        self._waiting = set(self._sites) - self._participants - set(refused)  # may join at any time
        self._returned: set[str] = set()
        self._without_part: set[str] = set()  # at the last poll

    def take(self, look: Mapping[str, Part]) -> tuple[list[str], list[str]]:
        """Process one poll of all sites. Returns messages to log, and participants that have just lost their part."""
        messages: list[str] = []
        lost: list[str] = []
        with self._lock:
            self._without_part = {site for site in self._participants if look[site] is not Part.RUNS}
            for site in self._sites:
                if look[site] is Part.AWAY:
                    messages += self._not_reached(site)
                    continue
                self._away.pop(site, None)
                if site in self._reported_away:
                    self._reported_away.discard(site)
                    messages += [f"{site} · connected again"] if look[site] is Part.RUNS else []
                if look[site] is Part.RUNS:
                    self._running.add(site)
                    self._suspected.discard(site)
                elif site not in self._participants:
                    messages += self._comes(site, "has connected")
                elif site not in self._lost and self._has_lost_its_part(site):
                    lost.append(site)
                    self._lost.add(site)
                    messages += self._comes(site, "restarted and lost its part of the job")
        return messages, lost

    @property
    def may_return(self) -> bool:
        """Whether a participant was not running its part at the last poll."""
        with self._lock:
            return bool(self._without_part)

    @property
    def returned(self) -> list[str]:
        """Connected sites that would get the job on resubmission."""
        with self._lock:
            return sorted(self._returned)

    def _not_reached(self, site: str) -> list[str]:
        since = self._away.setdefault(site, time.monotonic())
        self._returned.discard(site)
        self._suspected.discard(site)
        if site not in self._participants or site in self._lost:
            self._waiting.add(site)
            return []
        if site in self._reported_away or time.monotonic() - since < _SECONDS_TO_TELL:
            return []
        self._reported_away.add(site)
        return [f"{site} · unreachable for {time.monotonic() - since:.0f} s"]

    def _has_lost_its_part(self, site: str) -> bool:
        """Requires two polls in a row: a process that is ending normally may not have told the server yet."""
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
        return [f"{site} · {how}; joins in the next round"]


class PresenceWatch:
    """A thread that polls all sites every `seconds` until stopped, passing each poll to `found`."""

    def __init__(
        self, look: Callable[[], Mapping[str, Part]], found: Callable[[Mapping[str, Part]], None], seconds: float
    ) -> None:
        self._look, self._found, self._seconds = look, found, seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="presence", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop polling and wait for the thread to end."""
        self._stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stopped.wait(self._seconds):
            try:
                look = self._look()
                if not self._stopped.is_set():
                    self._found(look)
            except Exception:  # the job does not depend on polls; try again
                _logger.exception("polling the sites failed")


def look_at(cell: Any, sites: Collection[str], job_id: str) -> dict[str, Part]:
    """Poll the sites through the NVFlare cell of the job's server process."""
    from nvflare.fuel.f3.cellnet.core_cell import Message
    from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode

    replies = cell.core_cell.broadcast_request(  # Cell's own method streams, which NetAgent does not answer
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
        if not isinstance(reply.payload, list):  # untrusted input
            return Part.AWAY
        return Part.RUNS if f"{site}.{job_id}" in reply.payload else Part.GONE

    return {site: found(site) for site in sites}
