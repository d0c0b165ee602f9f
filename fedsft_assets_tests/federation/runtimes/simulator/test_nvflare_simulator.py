"""Sites of a simulation that end before their time; jobs whose processes are killed are in `faults/`."""

import logging
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from fedsft_assets.federation.runtimes.simulator.nvflare_simulator import _Sites


@pytest.mark.parametrize("error", [None, RuntimeError("the process of a site did not answer for 60 s"), EOFError()])
def test_server_is_told_of_a_site_that_has_ended_however_it_did(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    client, ended = SimpleNamespace(client_name="site-2", simulate_running=False), []

    def one_task(*_: Any, **__: Any) -> None:
        assert client.simulate_running
        if error:
            raise error

    sites = _Sites.__new__(_Sites)
    sites.logger, sites.has_ended = logging.getLogger(), ended.append
    monkeypatch.setattr(sites, "get_next_run_client", lambda _: client)
    monkeypatch.setattr(sites, "do_one_task", one_task)
    sites.run_client_thread(1, None, threading.Lock(), end_run_for_all=True)
    assert ended == ["site-2"]
    assert not client.simulate_running
