"""Whoever has the certificate of a study's user may run the study's jobs, and nothing else, anywhere."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from nvflare.fuel.flare_api.api_spec import AuthorizationError

from fedsft_assets.federation.protocol.messages import EXECUTION_KEY
from fedsft_assets.federation.runtimes.poc.system import PocSystem
from fedsft_assets.federation.runtimes.processes import marked_processes
from fedsft_assets.process_env import home_environment
from fedsft_assets.specs.runtime import PocSettings
from fedsft_assets.store import Store
from fedsft_assets.versions import current
from fedsft_assets_tests.provisioned import Federation, provision, running, session

pytestmark = pytest.mark.slow

SITE = "site-1"
_MOST_SECONDS = 240.0
_CODE = """
from pathlib import Path
from {module} import {name} as Original

Path({trace!r}).touch()


class Stranger(Original):
    pass
"""
SERVER_CONFIG = "app_server/config/config_fed_server.json"
SITE_CONFIG = f"app_{SITE}/config/config_fed_client.json"
SERVER_PART = ("fedsft_assets.federation.server.controller", "FederatedSFT")
TRAINER = ("fedsft_assets.federation.site.executor", "InstalledTrainer")


@dataclass(frozen=True)
class Victim:
    """A federation of one site that runs, with the kit of the user that submits jobs."""

    startup_kit: Path
    marks: list[str]

    def parents(self) -> set[int]:
        """NVFlare's processes that live from job to job."""
        found = set()
        for mark in self.marks:
            for process in marked_processes(mark):
                with suppress(psutil.Error):
                    if {"client_train", "server_train"} & {word.rpartition(".")[2] for word in process.cmdline()}:
                        found.add(process.pid)
        return found


@pytest.fixture(scope="module", params=["production", "poc"])
def federation(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    folder = tmp_path_factory.mktemp("federation")
    if request.param == "production":
        with running(Federation(provision(folder, sites=[SITE]), folder)) as provisioned:
            yield Victim(provisioned.kits.admin, provisioned.marks)
        return
    system = PocSystem(folder / "poc", PocSettings(), home_environment(folder))
    try:
        system.start([SITE])
        yield Victim(system.admin_kit, [system.mark])
    finally:
        system.stop()


@pytest.fixture
def job_folder(store: Store, build: Callable[..., str], tmp_path: Path) -> Path:
    job = build("alpaca", rounds=1, max_local_steps=1, max_evaluation_records=2)
    copy = shutil.copytree(current(store.job_folder(job)), tmp_path / "job")
    _change(copy / "meta.json", lambda meta: meta.update({EXECUTION_KEY: "attack"}))
    return copy


def _change(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _bring_code(app: Path, original: tuple[str, str], trace: Path) -> str:
    """The class that the job's own code defines."""
    (app / "custom").mkdir()
    module, name = original
    (app / "custom" / "stranger.py").write_text(_CODE.format(module=module, name=name, trace=str(trace)))
    return "stranger.Stranger"


def _code_at_the_server(job: Path, trace: Path) -> None:
    path = _bring_code(job / "app_server", SERVER_PART, trace)
    _change(job / SERVER_CONFIG, lambda config: config["workflows"][0].update(path=path))


def _code_at_a_site(job: Path, trace: Path) -> None:
    path = _bring_code(job / f"app_{SITE}", TRAINER, trace)
    _change(job / SITE_CONFIG, lambda config: config["executors"][0]["executor"].update(path=path))


def _code_that_replaces_what_is_installed(job: Path, trace: Path) -> None:
    package = job / "app_server" / "custom" / "fedsft_assets" / "federation"
    package.mkdir(parents=True)
    code = f"from pathlib import Path\nPath({str(trace)!r}).touch()\n__version__ = '0'\n"
    for path in (package.parent / "__init__.py", package / "__init__.py", package / "server.py"):
        path.write_text(code)


def _command_at_a_site(job: Path, trace: Path) -> None:
    executor = {
        "path": "nvflare.app_common.executors.client_api_executor.ClientAPIExecutor",
        "args": {"execution_mode": "external_process", "command": ["touch", str(trace)]},
    }
    _change(job / SITE_CONFIG, lambda config: config["executors"][0].update(executor=executor))


def _component_at_the_server(job: Path, trace: Path) -> None:
    component = {
        "id": "more",
        "path": "nvflare.app_opt.tracking.tb.tb_receiver.TBAnalyticsReceiver",
        "args": {"tb_folder": str(trace)},
    }
    _change(job / SERVER_CONFIG, lambda config: config["components"].append(component))


@pytest.mark.parametrize(
    "attack",
    [
        _code_at_the_server,
        _code_at_a_site,
        _code_that_replaces_what_is_installed,
        _command_at_a_site,
        _component_at_the_server,
    ],
)
def test_a_stolen_certificate_runs_no_code_of_the_thief(
    federation: Victim, job_folder: Path, tmp_path: Path, attack: Callable[[Path, Path], None]
) -> None:
    trace = tmp_path / "trace"
    attack(job_folder, trace)
    with session(federation.startup_kit) as connected:
        job_id = connected.submit_job(str(job_folder))
        begun = time.monotonic()
        while not (status := connected.get_job_meta(job_id)["status"]).startswith(("FINISHED", "FAILED", "REJECTED")):
            time.sleep(0.5)
            assert time.monotonic() - begun < _MOST_SECONDS, status
    assert status != "FINISHED:COMPLETED"
    assert not trace.exists()


@pytest.mark.parametrize(
    "command",
    [
        lambda session: session.cat_target(SITE, file="local/resources.json"),
        lambda session: session.grep_target("server", pattern="e", file="log.txt"),
        lambda session: session.ls_target("server"),
        lambda session: session.remove_client(SITE),
        lambda session: session.disable_client(SITE),
        lambda session: session.restart("client", wait=False),
        lambda session: session.restart("server", wait=False),
        lambda session: session.shutdown("all"),
    ],
    ids=["cat", "grep", "ls", "remove", "disable", "restart sites", "restart the server", "shutdown"],
)
def test_a_stolen_certificate_gives_no_command_over_machines(
    federation: Victim, command: Callable[[Any], object]
) -> None:
    before = federation.parents()
    with session(federation.startup_kit) as connected, suppress(AuthorizationError):
        said = command(connected)
        assert "not authorized" in str(said), said
    time.sleep(2.0)
    assert federation.parents() == before
