"""Sites of a simulation that end early; jobs whose processes are killed are in `faults/`."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedsft_assets.federation.runtimes.simulator.nvflare_simulator import SiteRunner


@pytest.mark.parametrize("error", [None, RuntimeError("the process of a site did not answer for 60 s"), EOFError()])
def test_server_is_told_of_a_site_that_has_ended_however_it_did(tmp_path: Path, error: Exception | None) -> None:
    class OneTask(SiteRunner):
        def do_one_task(self, client: Any, *_: Any, **__: Any) -> None:
            assert client.simulate_running
            if error:
                raise error

    site, ended = SimpleNamespace(client_name="site-2", simulate_running=False), list[str]()
    runner = OneTask(ended.append, "", SimpleNamespace(workspace=str(tmp_path), set=None), [site], {}, {}, {})
    runner.run_client_thread(1, None, threading.Lock(), end_run_for_all=True)
    assert ended == ["site-2"]
    assert not site.simulate_running
