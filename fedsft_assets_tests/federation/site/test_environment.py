"""What a site's operator has exported, whatever for, is none of the jobs' that run there."""

import os
from pathlib import Path

import pytest
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.executors.client_api_executor import ClientAPIExecutor

from fedsft_assets.credentials import PASS
from fedsft_assets.federation.connections.site_connection import SiteConnection
from fedsft_assets.federation.site.executor import InstalledTrainer
from fedsft_assets_tests.watched import PLANTED, open_to_others

OWN = {"PATH": "/usr/bin", "FEDSFT_SITE_HOME": "/site/home", PASS: "WHATEVER", "WHATEVER": PLANTED["WHATEVER"]}


@pytest.fixture(autouse=True)
def _operators_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {**PLANTED, **OWN})


def test_trainer_is_started_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = InstalledTrainer()
    assert PLANTED.items() <= os.environ.items()  # a study makes one too, to write it into a job
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(ClientAPIExecutor, "handle_event", lambda *_: seen.append(dict(os.environ)))
    trainer.handle_event(EventType.START_RUN, FLContext())
    assert seen == [OWN]


def _begin(kit: Path) -> None:
    """As NVFlare does when a site starts; it looks at no server then."""
    context = FLContext()
    context.set_prop(FLContextKey.WORKSPACE_ROOT, str(kit), private=True, sticky=False)
    connection = SiteConnection()
    connection.handle_event(EventType.SYSTEM_END, context)
    connection.handle_event(EventType.SYSTEM_BOOTSTRAP, context)


def test_process_of_a_job_is_started_without_it(tmp_path: Path) -> None:
    _begin(tmp_path)
    assert os.environ == OWN


def test_kit_of_a_site_is_closed_when_it_starts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "startup").mkdir()
    for name in ("log.txt", "startup/client.key"):
        (tmp_path / name).write_text("text")
        (tmp_path / name).chmod(0o644)
    for folder in (tmp_path, tmp_path / "startup"):
        folder.chmod(0o755)
    _begin(tmp_path)
    assert open_to_others(tmp_path) == []
    assert "Anyone who has read client.key can impersonate it" in caplog.text
