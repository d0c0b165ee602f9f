"""Which sites count as connected, by what a server says of them and by clocks that do not agree."""

import time
from pathlib import Path

import pytest

from fedsft_assets.federation.runtimes.flare.jobs import FlareJobs

SITES = ["site-1", "site-2"]


class Clock:
    now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class Server(FlareJobs):
    """A server whose clock is so many seconds ahead of this machine's; all its sites answer."""

    def __init__(self, folder: Path, clock: Clock, ahead: float) -> None:
        super().__init__(folder / "kit", folder / "own")
        self._clock, self._ahead = clock, ahead
        self.heartbeats: dict[str, float] = {}

    def beats(self, *sites: str) -> None:
        self.heartbeats |= dict.fromkeys(sites, self._clock.now + self._ahead)

    def _listed(self) -> dict[str, float]:
        return dict(self.heartbeats)

    def _versions(self, sites: list[str]) -> dict[str, str]:
        return dict.fromkeys(sites, "2.9.0")

    def connected(self) -> list[str]:
        answering, missing = self._look_at(SITES)
        assert all("locked out" in why or why == "not connected" for why in missing.values())
        return sorted(answering)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    monkeypatch.setattr(time, "time", clock)
    return clock


@pytest.mark.parametrize("ahead", [0.0, 3600.0, -3600.0])
def test_site_is_connected_while_its_heartbeats_come_whatever_the_servers_clock_says(
    tmp_path: Path, clock: Clock, ahead: float
) -> None:
    server = Server(tmp_path, clock, ahead)
    for _ in range(20):
        clock.now += 10.0
        server.beats(*SITES)
        server.connected()
    assert server.connected() == SITES


@pytest.mark.parametrize("ahead", [0.0, 3600.0, -3600.0])
def test_site_that_answers_and_is_not_heard_is_not_connected(tmp_path: Path, clock: Clock, ahead: float) -> None:
    server = Server(tmp_path, clock, ahead)
    server.beats(*SITES)
    server.connected()
    for _ in range(7):  # of site-2 another process is heard no more
        clock.now += 10.0
        server.beats("site-1")
        server.connected()
    assert server.connected() == ["site-1"]
    clock.now += 1.0
    server.beats("site-2")
    assert server.connected() == SITES


def test_site_that_the_server_does_not_list_is_not_connected(tmp_path: Path, clock: Clock) -> None:
    server = Server(tmp_path, clock, 0.0)
    server.beats("site-1")
    assert server.connected() == ["site-1"]
