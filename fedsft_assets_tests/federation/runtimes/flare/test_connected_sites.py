"""Which sites are ready for tasks, by what a server reports of them and by clocks that do not agree."""

from collections.abc import Callable
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fedsft_assets.federation.runtimes.flare.connected_sites import ConnectedSites, require_same_version
from fedsft_assets.federation.runtimes.flare.session import FlareSession
from fedsft_assets.federation.runtimes.interface import UnavailableError
from fedsft_assets_tests.federation.clock import Clock

SITES = ["site-1", "site-2"]


class Server:
    """A session with a server whose clock is `ahead` seconds ahead of this machine's; all its sites answer."""

    def __init__(self, ahead: float) -> None:
        self.clock, self._ahead = Clock(), ahead
        self._heartbeats: dict[str, float] = {}
        self._sites = ConnectedSites(cast(FlareSession, self), clock=self.clock, wall_clock=self.clock)

    def heartbeat(self, *sites: str) -> None:
        self._heartbeats |= dict.fromkeys(sites, self.clock.now + self._ahead)

    def ready(self) -> list[str]:
        ready, missing = self._sites.poll(SITES)
        assert all("locked out" in reason or reason == "not connected" for reason in missing.values())
        return sorted(ready)

    def call(self, call: Callable[[Any], Any], **_: Any) -> Any:
        return call(self)

    def get_connected_client_list(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(name=site, last_connect_time=time) for site, time in self._heartbeats.items()]

    def report_version(self, _kind: str, sites: list[str]) -> dict[str, dict[str, str]]:
        return {site: {"version": "2.9.0"} for site in sites}


@pytest.mark.parametrize("ahead", [0.0, 3600.0, -3600.0])
def test_site_is_ready_while_its_heartbeats_come_whatever_the_servers_clock_says(ahead: float) -> None:
    server = Server(ahead)
    for _ in range(20):
        server.clock.now += 10.0
        server.heartbeat(*SITES)
        server.ready()
    assert server.ready() == SITES


@pytest.mark.parametrize("ahead", [0.0, 3600.0, -3600.0])
def test_site_that_answers_without_heartbeats_is_not_ready(ahead: float) -> None:
    server = Server(ahead)
    server.heartbeat(*SITES)
    server.ready()
    for _ in range(7):  # the server no longer receives those of site-2
        server.clock.now += 10.0
        server.heartbeat("site-1")
        server.ready()
    assert server.ready() == ["site-1"]
    server.clock.now += 1.0
    server.heartbeat("site-2")
    assert server.ready() == SITES


def test_site_that_the_server_does_not_list_is_not_ready() -> None:
    server = Server(0.0)
    server.heartbeat("site-1")
    assert server.ready() == ["site-1"]


def test_other_version_of_nvflare_is_named_unless_it_is_a_patch_of_this_one() -> None:
    own = version("nvflare")
    patch = ".".join([*own.split(".")[:2], "99"])
    require_same_version({"server": own, "site-1": patch, "site-2": ""})
    with pytest.raises(UnavailableError, match=f"NVFlare here is {own}, but site-1 has 2.7.0; install the same"):
        require_same_version({"server": own, "site-1": "2.7.0"})
