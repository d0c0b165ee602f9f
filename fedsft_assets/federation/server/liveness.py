"""Which sites a round waits for: those that have not answered, and have been heard of not long ago."""

import threading
import time
from collections.abc import Collection

from fedsft_assets.federation.protocol.journal import Missed

_GONE = "disconnected"
_SECONDS_TO_START = 300.0  # NVFlare's own patience with a trainer that it starts


class SiteWatch:
    """A site is waited for until it answers, fails, or says nothing for `timeout` seconds.

    One that has said nothing yet in this job may still be starting, which may take five minutes whatever `timeout` is.
    Methods may be called from any thread.
    """

    def __init__(self, sites: Collection[str], timeout: float) -> None:
        self._sites, self._timeout = sorted(sites), timeout
        self._lock = threading.Lock()
        self._heard = dict.fromkeys(self._sites, time.monotonic())
        self._starting = set(self._sites)
        self._answered: set[str] = set(self._sites)
        self._lost: dict[str, str] = {}
        self._gone: dict[str, str] = {}  # and why; NVFlare may list them as connected for long
        self._failures: dict[str, str] = {}
        self._refused: dict[str, str] = {}  # and why, in this task

    def begin(self, connected: Collection[str]) -> None:
        """A task is given to these sites; who answered the last one was idle since, not silent."""
        with self._lock:
            for site in self._answered:
                self._heard[site] = time.monotonic()
            self._answered = set()
            self._refused = {}
            self._lost = {site: "it is not connected" for site in self._sites if site not in connected}
            self._lost.update(self._gone)
            self._lost.update(dict.fromkeys(self._failures, "its trainer failed"))

    def heard(self, site: str) -> None:
        with self._lock:
            if site in self._heard:
                self._heard[site] = time.monotonic()
                self._starting.discard(site)
            if site in self._gone:
                del self._gone[site]
                self._lost.pop(site, None)

    def done(self, site: str) -> None:
        with self._lock:
            self._answered.add(site)

    def gone(self, site: str, reason: str = _GONE) -> None:
        """It cannot do any task: no round waits for it until it is heard of again."""
        with self._lock:
            self._gone.setdefault(site, reason)
        self.lost(site, reason)

    def lost(self, site: str, reason: str) -> None:
        """It cannot do its task any more. The first reason is the one to tell."""
        with self._lock:
            if site not in self._answered:
                self._lost.setdefault(site, reason)

    def failed(self, site: str, traceback: str) -> None:
        """Its trainer says why it gives up; it will not come back in this job."""
        with self._lock:
            self._failures[site] = traceback
        self.lost(site, "its trainer failed")

    def refuse(self, site: str, why: str) -> None:
        """What it said cannot be used: this task goes on without it, whatever it has said or says then."""
        with self._lock:
            self._answered.discard(site)
            if self._refused.setdefault(site, why) == why:
                self._lost[site] = f"refused: {why}"

    @property
    def refused(self) -> dict[str, str]:
        """Sites whose word was refused in this task, and why."""
        with self._lock:
            return dict(self._refused)

    def has_failed(self, site: str) -> bool:
        with self._lock:
            return site in self._failures

    def waits(self, at_least: int) -> bool:
        """Whether there is a site to wait for, and so many may still answer in all."""
        with self._lock:
            open_sites = [site for site in self._sites if site not in self._answered and site not in self._lost]
            hopeful = [site for site in open_sites if not self._is_silent(site)]
            return bool(hopeful) and len(self._answered) + len(hopeful) >= at_least

    def missed(self, site: str, round: int) -> Missed:
        """Why a site did not answer."""
        with self._lock:
            reason = self._lost.get(site, "the round ended before it answered")
            if site not in self._lost and self._is_silent(site):
                silent = time.monotonic() - self._heard[site]
                reason = f"no message for {silent:.0f} s (site_timeout is {self._timeout:g} s)"
            return Missed(site, round, reason, self._failures.get(site))

    def _is_silent(self, site: str) -> bool:
        patience = max(self._timeout, _SECONDS_TO_START) if site in self._starting else self._timeout
        return time.monotonic() - self._heard[site] >= patience
