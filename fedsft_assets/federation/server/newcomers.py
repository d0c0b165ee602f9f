"""Sites that come, or come again, after a job has begun: NVFlare gives them no part of it.

If an operator follows the job, it ends after the round, to be submitted again for all sites that are there by then.
"""

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

from fedsft_assets.federation.protocol.journal import Journal, Progress
from fedsft_assets.federation.server.liveness import SiteWatch
from fedsft_assets.federation.server.presence import Part, Presence, PresenceWatch
from fedsft_assets.federation.server.state import RoundsDone

_SECONDS_TO_ASK_AGAIN = 30.0  # an operator that follows the job asks for its journal all the time
# For a site to be back, after which NVFlare would end the job; and for it to be seen that it is away.
_SECONDS_TO_RETURN, _SECONDS_TO_SEE = 45.0, 12.0


class RegroupError(Exception):
    """The job is to be submitted again, for these sites too."""

    def __init__(self, sites: list[str]) -> None:
        super().__init__(f"{', '.join(sites)}: not in this job; it ends to be submitted again")
        self.sites = sites


class Newcomers:
    """Which sites a job would be submitted again for. Until `look_with` there are none, as in the simulator."""

    def __init__(self, sites: Collection[str], progress: RoundsDone, journal: Journal, watch: SiteWatch) -> None:
        self._sites, self._progress, self._journal, self._watch = sites, progress, journal, watch
        self._presence: Presence | None = None
        self._look: Callable[[], Mapping[str, Part]] | None = None
        self._missing: list[str] = []
        self._asked_for_journal = -math.inf

    def look_with(self, participants: set[str], look: Callable[[], Mapping[str, Part]]) -> None:
        """Look at the sites in this way while `watched`; the participants were given the job."""
        self._progress.sent_for = sorted(set(self._progress.sent_for) - participants)
        self._missing = sorted(set(self._sites) - participants)
        self._presence = Presence(self._sites, participants, self._progress.sent_for)
        self._look = look

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Look at the sites from time to time, and tell what is found."""
        if self._presence is None or self._look is None:
            yield
            return
        self._tell([f"{site} · not connected; the job continues without it" for site in self._missing])
        watch = PresenceWatch(self._look, self.note)
        try:
            yield
        finally:
            watch.stop()

    def note(self, look: Mapping[str, Part]) -> None:
        """Take in one look at all sites."""
        assert self._presence is not None
        told, lost = self._presence.take(look)
        for site in lost:
            self._watch.gone(site, "it was started again, and its part of the job is gone")
        self._tell(told)

    def note_follower(self) -> None:
        """An operator asks for the journal."""
        self._asked_for_journal = time.monotonic()

    def require_none(self) -> None:
        """Raise RegroupError for sites that would get the job if it was submitted again, and somebody would do that."""
        if sites := self._have_come():
            raise RegroupError(sites)

    def wait_for_return(self, pause: Callable[[], None]) -> None:
        """Sites were lost without which a round cannot be: they may be about to start again."""
        begun = time.monotonic()
        while self._presence and self._is_followed and not self._have_come():
            waited = time.monotonic() - begun
            if waited > _SECONDS_TO_RETURN or (waited > _SECONDS_TO_SEE and not self._presence.may_return):
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
