"""Sites of a provisioned federation that come late, or are killed in a round and come back: the job has them again."""

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fedsft_assets.federation.protocol.events import Event
from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.federation.protocol.journal import Progress
from fedsft_assets.federation.runtimes.processes import marked_processes
from fedsft_assets.store import Store
from fedsft_assets_tests.provisioned import SERVER, SITES, Federation, events_of_job, provision, running
from fedsft_assets_tests.tracking.examples import until

pytestmark = pytest.mark.slow

ROUNDS = 5
SMALL = {"rounds": ROUNDS, "max_local_steps": 30, "max_evaluation_records": 8}  # a round takes seconds


@pytest.fixture(scope="module")
def federation(prepared_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """All on the study's machine, with the study's files."""
    folder = tmp_path_factory.mktemp("federation")
    variables = {name: {"FEDSFT_HOME": str(prepared_home)} for name in (SERVER, *SITES)}
    with running(Federation(provision(folder), folder, variables=variables)) as started:
        yield started


def _run(
    federation: Federation, store: Store, job: str, at: Callable[[str], bool], do: Callable[[], None]
) -> list[Event]:
    """Run the job as the study does, and do something once it has told what `at` waits for."""
    events, done = [], False
    for event in events_of_job(federation, store, job):
        events.append(event)
        print(time.strftime("%X"), event, flush=True)
        if not done and isinstance(event, Progress) and at(event.text):
            do()
            done = True
    assert done, events
    return events


def _has(*parts: str) -> Callable[[str], bool]:
    return lambda text: all(part in text for part in parts)


def _kill(federation: Federation, site: str) -> None:
    """All processes of a site at once, as when its machine dies."""
    processes = marked_processes(federation.mark_of(site))
    for process in processes:
        process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes)
    (federation.kits.sites[site] / "daemon_pid.fl").unlink(missing_ok=True)
    (federation.kits.sites[site] / "pid.fl").unlink(missing_ok=True)


def _texts(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Progress)]


def _stop(federation: Federation, site: str) -> None:
    """As its operator stops it."""
    subprocess.run(["bash", str(federation.kits.sites[site] / "startup/stop_fl.sh")], input=b"y\n", check=True)
    until(lambda: marked_processes(federation.mark_of(site)) == [], f"{site} has stopped")


@pytest.mark.parametrize(
    "end", [pytest.param(_kill, id="killed"), pytest.param(_stop, id="stopped", marks=pytest.mark.long)]
)
def test_a_site_that_is_started_again_gets_its_task_again_when_all_are_needed(
    federation: Federation, store: Store, build: Callable[..., str], end: Callable[[Federation, str], None]
) -> None:
    job = build("fedavg", **SMALL)

    def kill_and_start() -> None:
        end(federation, "site-2")
        federation.start("site-2")

    events = _run(federation, store, job, _has("site-2 · val_loss ", "after 1 of"), kill_and_start)
    said = "site-2 · restarted and lost its part of the job; joins in the next round"
    assert said in _texts(events)
    report = events[-1]
    assert isinstance(report, JobReport)
    assert report.missed == {}
    assert len(report.val_loss) == ROUNDS + 1
    kept = [path for kit in federation.kits.sites.values() for path in (kit / "fedsft").rglob("*.pt")]
    assert kept == []  # of the optimizer, once no round is left


def test_rounds_go_on_without_a_site_that_was_killed_and_with_it_once_it_is_back(
    federation: Federation, store: Store, build: Callable[..., str]
) -> None:
    job = build("fedavg", min_sites=2, **SMALL)

    def kill_and_start() -> None:
        _kill(federation, "site-3")
        federation.start("site-3")

    events = _run(federation, store, job, _has("site-3 · val_loss ", "after 1 of"), kill_and_start)
    report = events[-1]
    assert isinstance(report, JobReport)
    assert set(report.missed) == {"site-3"}
    assert ROUNDS not in report.missed["site-3"]  # it is in the last round again


@pytest.mark.long
def test_a_job_begins_without_a_site_and_has_it_once_it_comes(
    federation: Federation, store: Store, build: Callable[..., str]
) -> None:
    rounds = 4 * ROUNDS  # so that the job is not over before the site has started
    job = build("fedavg", min_sites=2, **{**SMALL, "rounds": rounds})
    _kill(federation, "site-1")
    events = _run(federation, store, job, _has("val_loss ", "after 1 of"), lambda: federation.start("site-1"))
    texts = _texts(events)
    assert any("starting without site-1" in text for text in texts)
    assert "site-1 · has connected; joins in the next round" in texts
    report = events[-1]
    assert isinstance(report, JobReport)
    assert 1 in report.missed["site-1"]
    assert rounds not in report.missed["site-1"]
