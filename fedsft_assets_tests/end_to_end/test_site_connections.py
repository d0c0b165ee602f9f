"""Startup kits of a provisioned federation that are connected twice, or are of another federation."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.federation.runtimes.flare.jobs import FlareJobs
from fedsft_assets.federation.runtimes.flare.session import FlareSession
from fedsft_assets.federation.runtimes.interface import UnavailableError
from fedsft_assets.federation.runtimes.processes import MARK, marked_processes, stop_marked
from fedsft_assets.specs.runtime import Timeouts
from fedsft_assets.store import Store
from fedsft_assets_tests.provisioned import SERVER, Federation, environment, events_of_job, provision, running
from fedsft_assets_tests.tracking.examples import until

pytestmark = pytest.mark.slow

SITE = "site-1"


@pytest.fixture(scope="module")
def federation(prepared_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """All on the study's machine, with the study's files."""
    folder = tmp_path_factory.mktemp("federation")
    variables = {name: {"FEDSFT_HOME": str(prepared_home)} for name in (SERVER, SITE)}
    with running(Federation(provision(folder, [SITE]), folder, variables=variables)) as started:
        yield started


@pytest.fixture
def start(federation: Federation, tmp_path: Path) -> Iterator[Callable[[Path], str]]:
    """Start a site from a kit as its operator does; gives the mark of its processes."""
    marks = []

    def start(kit: Path) -> str:
        marks.append(f"{federation.mark} {kit.name} {len(marks)}")
        with (tmp_path / "console.log").open("ab") as log:
            subprocess.run(
                ["bash", str(kit / "startup/start.sh")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment(federation.folder), MARK: marks[-1]},
                start_new_session=True,
                check=True,
            )
        return marks[-1]

    yield start
    for mark in marks:
        stop_marked(mark)


def _said(kit: Path) -> str:
    log = kit / "log.txt"
    return log.read_text(errors="replace") if log.exists() else ""


def _copy(kit: Path, target: Path) -> Path:
    shutil.copytree(kit, target)
    for path in (*target.glob("*.fl"), target / "log.txt"):
        path.unlink(missing_ok=True)
    return target


def _without_our_component(kit: Path) -> None:
    """As NVFlare makes it."""
    path = kit / "local" / "resources.json"
    resources = json.loads(path.read_text())
    resources["components"] = [one for one in resources["components"] if one["id"] != "site_connection"]
    path.write_text(json.dumps(resources))


def _jobs(federation: Federation, folder: Path, seconds: float) -> FlareJobs:
    return FlareJobs(FlareSession(federation.kits.admin, folder, timeouts=Timeouts(connect=60, sites=seconds)))


def _trains(federation: Federation, store: Store, job: str) -> bool:
    """Whether a job gets to its end."""
    *_, last = events_of_job(federation, store, job)
    return isinstance(last, JobReport)


@pytest.mark.long
def test_a_copy_of_a_kit_says_that_it_must_not_run_and_ends_and_the_site_goes_on(
    federation: Federation,
    start: Callable[[Path], str],
    store: Store,
    build: Callable[..., str],
    tmp_path: Path,
) -> None:
    real = federation.kits.sites[SITE]
    with _jobs(federation, tmp_path / "own", 120) as jobs:
        jobs.prepare([SITE])
        time.sleep(130)  # it has been here for a while
        copy = _copy(real, tmp_path / "copy")
        mark = start(copy)
        until(lambda: "registering again" in _said(real), "the site notices that it is locked out")
        assert "with a copy of this startup kit" in _said(real)
        until(lambda: "shutting this one down" in _said(copy), "the copy notices that it is one")
        until(lambda: marked_processes(mark) == [], "the copy ends")
        time.sleep(40)  # so long a site counts as connected after its last heartbeat
        jobs.prepare([SITE])
    assert _trains(federation, store, build("alpaca", rounds=1, max_local_steps=2, max_evaluation_records=8))


def test_a_site_that_is_locked_out_is_not_counted_as_connected_and_the_study_hears_why(
    federation: Federation, start: Callable[[Path], str], tmp_path: Path
) -> None:
    """Both as NVFlare makes them, so that neither does anything about it."""
    federation.stop(SITE)
    real = _copy(federation.kits.sites[SITE], tmp_path / "real")
    _without_our_component(real)
    start(real)
    with _jobs(federation, tmp_path / "own", 120) as jobs:
        jobs.prepare([SITE])
        mark = start(_copy(real, tmp_path / "copy"))
        until(lambda: "Successfully registered" in _said(tmp_path / "copy"), "the copy registers")
        stop_marked(mark, grace=0)
        time.sleep(45)  # the server has not heard the copy's heartbeat for longer than a site may be silent
    with (
        _jobs(federation, tmp_path / "other", 15) as jobs,
        pytest.raises(UnavailableError, match="site-1 is locked out: another process has registered with its startup"),
    ):
        jobs.prepare([SITE])
    federation.start(SITE)
    with _jobs(federation, tmp_path / "third", 120) as jobs:
        jobs.prepare([SITE])


def test_a_kit_of_another_federation_says_so_in_its_log_and_before_it_is_started(
    federation: Federation, start: Callable[[Path], str], tmp_path: Path
) -> None:
    configuration = federation.kits.sites[SITE] / "startup/fed_client.json"
    target = json.loads(configuration.read_text())["servers"][0]["service"]["target"]
    kits = provision(tmp_path / "other", ["site-7"], port=int(target.rpartition(":")[2]))
    kit = kits.sites["site-7"]
    start(kit)
    why = f"the server at {target} and the startup kit {kit} (project 'study') do not belong to the same federation"
    until(lambda: f"not connected: {why}" in _said(kit), "the site says why it cannot connect")

    def reach(kit: Path) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "fedsft_assets.cli.site", "reach", str(kit)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert why in reach(kit).stderr
    assert "both sides accept each other's certificate" in reach(federation.kits.sites[SITE]).stdout
    shutil.copyfile(federation.kits.sites[SITE] / "startup/rootCA.pem", kit / "startup/rootCA.pem")
    assert f"the server at {target} does not accept the certificate of the startup kit {kit}" in reach(kit).stderr
    assert (
        reach(tmp_path).stderr
        == f"{tmp_path}: startup/fed_client.json is missing; expected the startup kit of a site\n"
    )
