"""Tracks which sites a round still waits for: unanswered, and heard from recently."""

import threading
import time
from collections.abc import Collection

from fedsft_assets.federation.protocol.journal import Missed

_GONE = "disconnected"
_SECONDS_TO_START = 300.0  # NVFlare's own timeout for a starting trainer


class SiteWatch:
    """Waits for each site until it answers, fails, or is silent for `timeout` seconds.

    A site not heard from yet in this job may still be starting, and gets at least five minutes. Thread-safe.
    """

    def __init__(self, sites: Collection[str], timeout: float) -> None:
        self._sites, self._timeout = sorted(sites), timeout
        self._lock = threading.Lock()
        self._heard = dict.fromkeys(self._sites, time.monotonic())
        self._starting = set(self._sites)
        self._answered: set[str] = set(self._sites)
        self._lost: dict[str, str] = {}
        self._gone: dict[str, str] = {}  # site -> reason; NVFlare may list them as connected for a long time
        self._failures: dict[str, str] = {}
        self._refused: dict[str, str] = {}  # site -> reason, in this task

    def begin(self, connected: Collection[str]) -> None:
        """Start a task for the connected sites. Sites that answered the previous task were idle, not silent."""
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
        """The site is unreachable: no round waits for it until it is heard from again."""
        with self._lock:
            self._gone.setdefault(site, reason)
        self.lost(site, reason)

    def lost(self, site: str, reason: str) -> None:
        """The site cannot complete its current task. The first reason given is kept."""
        with self._lock:
            if site not in self._answered:
                self._lost.setdefault(site, reason)

    def failed(self, site: str, traceback: str) -> None:
        """The site's trainer failed, and will not return in this job."""
        with self._lock:
            self._failures[site] = traceback
        self.lost(site, "its trainer failed")

    def refuse(self, site: str, why: str) -> None:
        """Exclude the site from this task because of an invalid message, whatever else it sends."""
        with self._lock:
            self._answered.discard(site)
            if self._refused.setdefault(site, why) == why:
                self._lost[site] = f"refused: {why}"

    @property
    def refused(self) -> dict[str, str]:
        """Sites excluded from this task, with the reasons."""
        with self._lock:
            return dict(self._refused)

    def has_failed(self, site: str) -> bool:
        with self._lock:
            return site in self._failures

    def waits(self, at_least: int) -> bool:
        """Whether to keep waiting: a site is pending, and `at_least` answers are still possible."""
        with self._lock:
            open_sites = [site for site in self._sites if site not in self._answered and site not in self._lost]
            pending = [site for site in open_sites if not self._is_silent(site)]
            return bool(pending) and len(self._answered) + len(pending) >= at_least

    def missed(self, site: str, round: int) -> Missed:
        """The record of a site that did not answer, with the reason."""
        with self._lock:
            reason = self._lost.get(site, "the round ended before it answered")
            if site not in self._lost and self._is_silent(site):
                silent = time.monotonic() - self._heard[site]
                reason = f"no message for {silent:.0f} s (site_timeout is {self._timeout:g} s)"
            return Missed(site, round, reason, self._failures.get(site))

    def _is_silent(self, site: str) -> bool:
        patience = max(self._timeout, _SECONDS_TO_START) if site in self._starting else self._timeout
        return time.monotonic() - self._heard[site] >= patience
