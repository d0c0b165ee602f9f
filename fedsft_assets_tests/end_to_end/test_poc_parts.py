"""A POC of which parts are killed or frozen in the middle of a job, which then has the same result to the bit."""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from fedsft_assets.federation.protocol.events import Event, JobError
from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.federation.protocol.journal import Progress
from fedsft_assets.federation.protocol.points import Point
from fedsft_assets.federation.runtimes.poc.kits import SERVER
from fedsft_assets.federation.runtimes.poc.system import PocSystem
from fedsft_assets.federation.runtimes.processes import marked_processes
from fedsft_assets.federation.supervisor.launch import run_job
from fedsft_assets.federation.supervisor.workspace import Workspace
from fedsft_assets.process_env import home_environment
from fedsft_assets.specs.runtime import PocSettings, RuntimeSettings
from fedsft_assets.store import Store, split_file
from fedsft_assets.versions import current
from fedsft_assets_tests.prepared import build_job

pytestmark = pytest.mark.slow

SITES = ["site-1", "site-2", "site-3"]
ROUNDS = 4
SMALL = {"rounds": ROUNDS, "max_local_steps": 2, "max_evaluation_records": 8, "site_timeout": 20}
ATTEMPTS = 3  # as many as Dagster makes
JOB_AT_SERVER, JOB_AT_SITE = (
    "nvflare.private.fed.app.server.runner_process",
    "nvflare.private.fed.app.client.worker_process",
)


@dataclass
class Study:
    """A home with one job, and its POC."""

    store: Store
    system: PocSystem
    job: str
    events: list[Event] = field(default_factory=list)

    def run(self, after: int | None = None, act: Callable[[], object] = lambda: None) -> JobReport:
        """Attempts until one ends well; `act` once, when the model of so many rounds has been scored."""
        for attempt in reversed(range(ATTEMPTS)):
            try:
                for event in self._attempt():
                    self.events.append(event)
                    print(time.strftime("%H:%M:%S"), event)
                    if isinstance(event, Point) and (event.name, event.site, event.round) == ("val_loss", None, after):
                        after = None
                        act()
            except JobError as error:
                print(time.strftime("%H:%M:%S"), error)
                if not attempt or not error.retryable:
                    raise
                continue
            report = self.events[-1]
            assert isinstance(report, JobReport)
            Workspace(self.store.flare(self.job)).end()
            return report
        raise AssertionError

    def _attempt(self) -> Iterator[Event]:
        return run_job(
            job=current(self.store.job_folder(self.job)),
            workspace=self.store.flare(self.job),
            testing_file=split_file(current(self.store.combined), "testing"),
            into=self.store.checkpoint(self.job),
            runtime=RuntimeSettings(name="poc"),
        )

    def parents(self, *names: str) -> list[psutil.Process]:
        """NVFlare's own processes of the server or of sites."""
        services = self.system.status().services
        return [psutil.Process(pid) for name in names if (pid := services[name])]

    def job_processes(self, module: str) -> list[psutil.Process]:
        found = []
        for process in marked_processes(self.system.mark):
            with contextlib.suppress(psutil.Error):
                if module in process.cmdline():
                    found.append(process)
        return found


def _mostly_long(first: str, *others: str) -> list[object]:
    """The first one always, the others where there is time."""
    return [first, *(pytest.param(other, marks=pytest.mark.long) for other in others)]


@pytest.fixture(scope="module")
def study(prepared_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Study]:
    home = tmp_path_factory.mktemp("study") / "home"
    shutil.copytree(prepared_home, home, symlinks=True)
    store = Store(home)
    job = build_job(store, "fedavg", **SMALL)
    system = PocSystem(home / "poc", PocSettings(), home_environment(home), SITES)
    try:
        yield Study(store, system, job)
    finally:
        system.stop()


@pytest.fixture(scope="module")
def undisturbed(study: Study) -> JobReport:
    return study.run()


@pytest.fixture(autouse=True)
def _no_events(study: Study) -> None:
    study.events.clear()


def _is_the_same(report: JobReport, undisturbed: JobReport) -> None:
    assert report.checkpoint_digest == undisturbed.checkpoint_digest
    assert report.val_loss == undisturbed.val_loss
    assert report.missed == {}


def _texts(study: Study) -> str:
    return "\n".join(event.text for event in study.events if isinstance(event, Progress))


@pytest.mark.parametrize("victims", _mostly_long("everything", "the server", "the server and the sites", "the sites"))
def test_killed_parts_of_a_poc_are_started_again_and_the_job_goes_on_after_its_last_round(
    study: Study, undisturbed: JobReport, victims: str
) -> None:
    def kill() -> None:
        found = {
            "the server": lambda: study.parents(SERVER),
            "the server and the sites": lambda: study.parents(SERVER, *SITES),
            "the sites": lambda: study.parents(*SITES),
            "everything": lambda: marked_processes(study.system.mark),
        }[victims]()
        assert found
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    report = study.run(after=1, act=kill)
    assert study.system.status().state == "running"
    _is_the_same(report, undisturbed)
    if victims != "the sites":
        assert "resuming after round " in _texts(study)


@pytest.mark.parametrize("victims", _mostly_long("a site", "the server", "the job at the server", "the job at a site"))
def test_frozen_parts_of_a_poc_do_no_harm(study: Study, undisturbed: JobReport, victims: str) -> None:
    def freeze() -> None:
        found = {
            "the server": lambda: study.parents(SERVER),
            "a site": lambda: study.parents("site-2"),
            "the job at the server": lambda: study.job_processes(JOB_AT_SERVER),
            "the job at a site": lambda: study.job_processes(JOB_AT_SITE)[:1],
        }[victims]()
        assert found
        for process in found:
            process.suspend()
        time.sleep(SMALL["site_timeout"] + 10)
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    _is_the_same(study.run(after=1, act=freeze), undisturbed)
