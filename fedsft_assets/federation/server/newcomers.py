"""Sites that connect or restart after a job has started: NVFlare does not deploy the job to them.

If an operator follows the job, it ends after the round to be resubmitted to all sites connected by then.
"""

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from fedsft_assets.federation.protocol.journal import Journal, Progress
from fedsft_assets.federation.server.liveness import SiteWatch
from fedsft_assets.federation.server.presence import Part, Presence, PresenceWatch
from fedsft_assets.federation.server.state import RoundsDone

_SECONDS_TO_ASK_AGAIN = 30.0  # a following operator polls the journal continuously


@dataclass(frozen=True)
class PresenceTimes:
    """Seconds between polls, for a disconnect to be noticed, and for a lost site to return."""

    between_polls: float = 3.0
    to_notice: float = 12.0
    to_return: float = 45.0


class RegroupError(Exception):
    """The job must be resubmitted to include these sites."""

    def __init__(self, sites: list[str]) -> None:
        super().__init__(f"{', '.join(sites)}: not in this job yet; ending it to be resubmitted")
        self.sites = sites


class Newcomers:
    """Tracks sites for which the job should be resubmitted. None before `look_with` is called, as in the simulator."""

    def __init__(self, sites: Collection[str], progress: RoundsDone, journal: Journal, watch: SiteWatch) -> None:
        self._sites, self._progress, self._journal, self._watch = sites, progress, journal, watch
        self._presence: Presence | None = None
        self._look: Callable[[], Mapping[str, Part]] | None = None
        self._missing: list[str] = []
        self._asked_for_journal = -math.inf
        self.times = PresenceTimes()

    def look_with(self, participants: set[str], look: Callable[[], Mapping[str, Part]]) -> None:
        """Poll presence with `look` while `watched`; `participants` are the sites that the job was deployed to."""
        self._progress.sent_for = sorted(set(self._progress.sent_for) - participants)
        self._missing = sorted(set(self._sites) - participants)
        self._presence = Presence(self._sites, participants, self._progress.sent_for)
        self._look = look

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Poll the sites in the background and journal changes."""
        if self._presence is None or self._look is None:
            yield
            return
        self._tell([f"{site} · not connected; the job continues without it" for site in self._missing])
        watch = PresenceWatch(self._look, self.note, self.times.between_polls)
        try:
            yield
        finally:
            watch.stop()

    def note(self, look: Mapping[str, Part]) -> None:
        """Process one poll of all sites."""
        assert self._presence is not None
        messages, lost = self._presence.take(look)
        for site in lost:
            self._watch.gone(site, "the site restarted and lost its part of the job")
        self._tell(messages)

    def note_follower(self) -> None:
        """Record that an operator polled the journal."""
        self._asked_for_journal = time.monotonic()

    def require_none(self) -> None:
        """Raise RegroupError if sites could join by resubmission and an operator follows the job."""
        if sites := self._have_come():
            raise RegroupError(sites)

    def wait_for_return(self, pause: Callable[[], None]) -> None:
        """Wait for lost sites that a round needs: they may be restarting."""
        begun = time.monotonic()
        while self._presence and self._is_followed and not self._have_come():
            waited = time.monotonic() - begun
            noticed = waited > self.times.to_notice
            if waited > self.times.to_return or (noticed and not self._presence.may_return):
                return
            pause()

    def _have_come(self) -> list[str]:
        if self._presence is None or not self._is_followed:
            return []
        return [site for site in self._presence.returned if not self._watch.has_failed(site)]

    @property
    def _is_followed(self) -> bool:
        return time.monotonic() - self._asked_for_journal < _SECONDS_TO_ASK_AGAIN

    def _tell(self, texts: list[str]) -> None:
        if texts:
            self._journal.add(map(Progress, texts), durable=False)
