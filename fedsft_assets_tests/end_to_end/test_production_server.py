"""What a study gets from a production federation whose server refuses, restarts or loses what it had, on loopback."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedsft_assets.federation.protocol.events import Event
from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.federation.protocol.journal import JOURNAL_FILE, Progress, RoundDone, Started, from_line
from fedsft_assets.federation.protocol.points import Point
from fedsft_assets.federation.runtimes.interface import RefusedError
from fedsft_assets.federation.runtimes.production import Production
from fedsft_assets.federation.supervisor.workspace import Workspace
from fedsft_assets.specs.runtime import ProductionSettings
from fedsft_assets.store import Store
from fedsft_assets_tests.provisioned import (
    SERVER,
    SITES,
    Federation,
    events_of_job,
    provision,
    running,
    session,
    take_rights_at_server,
)

pytestmark = pytest.mark.slow

ROUNDS = 6
SMALL = {"rounds": ROUNDS, "max_local_steps": 2, "max_evaluation_records": 8, "min_sites": 2}


@pytest.fixture(scope="module")
def federation(prepared_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("federation")
    variables = {name: {"FEDSFT_HOME": str(prepared_home)} for name in (SERVER, *SITES)}
    with running(Federation(provision(folder), folder, variables=variables)) as started:
        yield started


Act = Callable[[Event], None]


def _run(federation: Federation, store: Store, job: str, act: Act) -> tuple[list[Event], JobReport]:
    events = []
    for event in events_of_job(federation, store, job):
        print(time.strftime("%H:%M:%S"), event)
        events.append(event)
        act(event)
    report = events[-1]
    assert isinstance(report, JobReport)
    return events, report


def _once(matches: Callable[[Event], bool], do: Callable[[], object]) -> Act:
    done: list[Event] = []

    def act(event: Event) -> None:
        if not done and matches(event):
            done.append(event)
            do()

    return act


def _after_round(number: int) -> Callable[[Event], bool]:
    return lambda event: (
        isinstance(event, Point) and (event.name, event.site, event.round) == ("val_loss", None, number)
    )


def _texts(events: list[Event]) -> str:
    return "\n".join(event.text for event in events if isinstance(event, Progress))


def _is_whole(store: Store, job: str, report: JobReport) -> None:
    """All of the report is of the one history that it names."""
    execution = Workspace(store.flare(job)).execution()
    assert execution is not None
    assert report.history == execution.id
    lines = Workspace(store.flare(job)).journal.read_text().splitlines()
    entries = [from_line(line) for line in lines]
    points = [entry for entry in entries if isinstance(entry, Point)]
    losses = {point.round: point.value for point in points if (point.name, point.site) == ("val_loss", None)}
    assert report.val_loss == [losses[number] for number in range(ROUNDS + 1)]
    rounds = [entry.round for entry in entries if isinstance(entry, RoundDone)]
    assert rounds == sorted(set(rounds))
    resumed_after = {entry.finished for entry in entries if isinstance(entry, Started)}
    assert {0, *rounds} | resumed_after == set(range(ROUNDS + 1))


def test_rights_that_the_server_does_not_give_are_named_before_a_job_starts(tmp_path: Path) -> None:
    lacking = Federation(provision(tmp_path, sites=["site-1"]), tmp_path)
    take_rights_at_server(lacking.kits.server, "app_command", "get_job_log")
    settings = ProductionSettings.model_validate({"startup_kit": lacking.kits.admin, "timeouts": {"connect": 180}})
    try:
        lacking.start(SERVER)
        with Production(settings, tmp_path / "own") as runtime, pytest.raises(RefusedError) as refused:
            runtime.prepare(["site-1"])
        with session(lacking.kits.admin) as connected:
            assert connected.list_jobs() == []
    finally:
        lacking.stop(SERVER)
    assert (
        str(refused.value)
        .partition(" missing: ")[2]
        .startswith(
            "app_command (to read the journal of a running job), get_job_log (to report why a job failed); add them to"
        )
    )


def test_job_goes_on_after_its_last_round_when_the_server_was_restarted(
    federation: Federation, store: Store, build: Callable[..., str]
) -> None:
    job = build("fedavg", **SMALL)

    def restart() -> None:
        federation.stop(SERVER)
        federation.start(SERVER)

    events, report = _run(federation, store, job, _once(_after_round(3), restart))
    assert "failed: its server died (LOST" in _texts(events)
    assert "resuming after round " in _texts(events)
    _is_whole(store, job, report)


@pytest.mark.long
def test_result_that_the_server_died_with_is_handed_over_by_its_state(
    federation: Federation, store: Store, build: Callable[..., str]
) -> None:
    job = build("fedavg", **SMALL)
    storage = federation.kits.server / "fedsft"

    def kill_when_finished() -> None:
        execution = Workspace(store.flare(job)).execution()
        assert execution is not None
        journal = storage / execution.id / JOURNAL_FILE
        while '"finished"}' not in journal.read_text().splitlines()[-1]:
            time.sleep(0.01)
        federation.stop(SERVER)
        federation.start(SERVER)

    events, report = _run(federation, store, job, _once(_after_round(ROUNDS - 1), kill_when_finished))
    assert f"resuming after round {ROUNDS} of {ROUNDS}" in _texts(events)
    _is_whole(store, job, report)


@pytest.mark.long
def test_job_without_which_a_site_left_is_finished_however_nvflare_ends_it(
    federation: Federation, store: Store, build: Callable[..., str]
) -> None:
    job = build("fedavg", site_timeout=60, **SMALL)

    def leave_and_return() -> None:
        federation.stop("site-2")
        federation.start("site-2")

    events, report = _run(federation, store, job, _once(_after_round(1), leave_and_return))
    assert "; restarting" not in _texts(events)
    _is_whole(store, job, report)
