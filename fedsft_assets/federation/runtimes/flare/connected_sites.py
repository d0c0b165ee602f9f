"""Which of a job's sites are connected to the server and ready for tasks.

NVFlare's server lists a site for minutes after it has gone, so each listed site is asked for its NVFlare version. A
site that answers is still not ready if the server no longer receives its heartbeats: then another process has
registered with the same startup kit, and the server ignores the site's own messages.
"""

import importlib.metadata
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from fedsft_assets.federation.runtimes.flare.session import FlareSession
from fedsft_assets.federation.runtimes.interface import UnavailableError

_POLL_SECONDS = 0.5
_ANSWER_SECONDS = 10.0
_QUIET_SECONDS = 2.0  # before a missing site is reported
_HEARTBEAT_TIMEOUT = 30.0  # seconds; sites send one every 10
_NOT_CONNECTED = "not connected"
_NO_ANSWER = "does not answer, though the server still lists it: its process or its network link is down"
_LOCKED_OUT = (
    "is locked out: another process has registered with its startup kit, and the server accepts messages from that"
    " process only; find the copy of the kit and stop the process that uses it: the site reconnects within ten minutes,"
    " or at once when it is restarted"
)
_NO_REPLY = "No replies"  # NVFlare's server, for a site that did not answer


class ConnectedSites:
    """The sites of a running NVFlare system, as seen by its server."""

    def __init__(
        self,
        session: FlareSession,
        late_site_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`late_site_seconds` is how long the remaining sites are waited for once enough are ready."""
        self._session = session
        self._late_site_seconds = late_site_seconds
        self._clock, self._wall_clock = clock, wall_clock
        self._last_heartbeat: dict[str, float] = {}  # by the server's clock
        self._heartbeat_seen: dict[str, float] = {}  # by this process's clock

    def wait_for(self, sites: list[str], at_least: int) -> Iterator[str]:
        """Wait until `at_least` of the sites are ready; yields a message for each missing site.

        Raises UnavailableError naming the missing sites with the reason for each, or participants whose NVFlare version
        differs from this process's.
        """
        timeout = self._session.timeouts.sites
        started, reported = self._clock(), dict[str, str]()
        while True:
            ready, missing = self.poll(sites)
            exited = self.exited(sorted(missing))
            waited = self._clock() - started
            if len(ready) >= at_least and (
                len(missing) == len(exited) or waited > min(self._late_site_seconds, timeout)
            ):
                break
            if len(sites) - len(exited) < at_least or waited > timeout:
                raise UnavailableError(
                    self.explain(missing if waited > timeout else {site: missing[site] for site in exited})
                )
            for site, reason in missing.items():
                if reported.get(site) != reason and waited > _QUIET_SECONDS:
                    yield f"waiting for {site}: {reason}"
                    reported[site] = reason
            time.sleep(_POLL_SECONDS)
        for site, reason in missing.items():
            yield f"starting without {site}, which may join later: {reason}"
        server = self._session.call(lambda session: session.report_version("server"))["server"]["version"]
        require_same_version({"server": server, **ready})

    def poll(self, sites: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
        """The NVFlare version of each ready site, and the reason for each site that is not ready."""
        heartbeats = self.heartbeats()
        versions = self._versions(sorted(heartbeats.keys() & set(sites)))
        ready: dict[str, str] = {}
        missing: dict[str, str] = {}
        newest = max(self._wall_clock(), *heartbeats.values()) if heartbeats else 0.0
        for site in sorted(sites):
            if site not in heartbeats:
                missing[site] = _NOT_CONNECTED
                continue
            recent = newest - heartbeats[site] < _HEARTBEAT_TIMEOUT
            seen = self._clock() - self._heartbeat_seen_at(site, heartbeats[site]) < _HEARTBEAT_TIMEOUT
            if site not in versions:
                missing[site] = _NO_ANSWER
            elif recent or seen:
                ready[site] = versions[site]
            else:
                missing[site] = _LOCKED_OUT
        return ready, missing

    def heartbeats(self) -> dict[str, float]:
        """The last heartbeat of each site that the server lists, in seconds since the epoch by the server's clock."""
        clients = self._session.call(lambda session: session.get_connected_client_list())
        return {client.name: float(client.last_connect_time) for client in clients}

    def exited(self, missing: list[str]) -> list[str]:  # noqa: ARG002
        """Those of the missing sites whose processes are known to have ended."""
        return []

    def explain(self, missing: Mapping[str, str]) -> str:
        """An error message about missing sites, given the reason for each."""
        unknown = [site for site, reason in missing.items() if reason == _NOT_CONNECTED]
        others = [f"{site} {reason}" for site, reason in missing.items() if reason != _NOT_CONNECTED]
        listed = ", ".join(sorted(self.heartbeats())) or "none"
        address = self._session.address
        parts = []
        if unknown:
            verb = "is" if len(unknown) == 1 else "are"
            parts.append(
                f"{', '.join(unknown)} {verb} {_NOT_CONNECTED} to the server at {address} (it lists: {listed})"
            )
        if others:
            parts.append(f"server at {address}: {'; '.join(others)}")
        return f"{'; '.join(parts)}; start the site, or remove it from the job file"

    def _heartbeat_seen_at(self, site: str, heartbeat: float) -> float:
        """When this process saw the site's last heartbeat arrive, by its own clock; -inf if never."""
        before = self._last_heartbeat.get(site, heartbeat)
        self._last_heartbeat[site] = heartbeat
        if heartbeat > before:
            self._heartbeat_seen[site] = self._clock()
        return self._heartbeat_seen.get(site, float("-inf"))

    def _versions(self, sites: list[str]) -> dict[str, str]:
        """NVFlare's version at each site that answers; empty for a site that answers without one."""
        from nvflare.fuel.flare_api.api_spec import InvalidTarget, NoConnection

        def report_version(session: Any) -> dict[str, dict[str, str]]:
            try:
                return dict(session.report_version("client", sites))
            except (InvalidTarget, NoConnection):  # one of them has just left
                return {}

        replies = self._session.call(report_version, command_timeout=_ANSWER_SECONDS) if sites else {}
        return {
            site: str(reply.get("version") or "")
            for site, reply in replies.items()
            if reply.get("error", "") != _NO_REPLY
        }


def require_same_version(versions: Mapping[str, str]) -> None:
    """Raise UnavailableError unless all have this process's NVFlare version; patch releases may differ."""
    own = importlib.metadata.version("nvflare")
    other = [
        f"{name} has {found}" for name, found in sorted(versions.items()) if found and _minor(found) != _minor(own)
    ]
    if other:
        raise UnavailableError(f"NVFlare here is {own}, but {', '.join(other)}; install the same version everywhere")


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]
