"""Jobs in a running NVFlare system: their journal, state and result, and the errors when something is missing."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from fedsft_assets.federation.runtimes.flare.jobs import FlareJobs
from fedsft_assets.federation.runtimes.flare.session import FlareSession
from fedsft_assets.federation.runtimes.interface import JobState, ResultLostError, UnavailableError
from fedsft_assets.federation.runtimes.poc.kits import SERVER
from fedsft_assets.federation.runtimes.poc.system import PocSystem
from fedsft_assets.federation.runtimes.production import Production
from fedsft_assets.process_env import home_environment
from fedsft_assets.specs.runtime import PocSettings, ProductionSettings, Timeouts
from fedsft_assets_tests.federation.small_jobs import small_jobs_allowed, write_job

pytestmark = pytest.mark.slow

SITES = ["site-1", "site-2"]
LINES = [f"line {k}" for k in range(12)]
_IMPATIENT = Timeouts(connect=4, sites=1, reconnect=4)


@pytest.fixture(scope="module", autouse=True)
def _allowed() -> Iterator[None]:
    with small_jobs_allowed():
        yield


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PocSystem]:
    home = tmp_path_factory.mktemp("home")
    system = PocSystem(home / "poc", PocSettings(), home_environment(home))
    try:
        system.start(SITES)
        yield system
    finally:
        system.stop()


@pytest.fixture
def connect(system: PocSystem, tmp_path: Path) -> Iterator[Callable[..., FlareJobs]]:
    """Connections of several processes, in effect: each object knows nothing of the others."""
    opened: list[FlareJobs] = []

    def connect_anew(kit: Path = system.admin_kit, timeouts: Timeouts | None = None) -> FlareJobs:
        opened.append(FlareJobs(FlareSession(kit, tmp_path / f"flare-{len(opened)}", timeouts=timeouts)))
        return opened[-1]

    yield connect_anew
    for jobs in opened:
        jobs.close()


@pytest.fixture
def jobs(connect: Callable[..., FlareJobs]) -> FlareJobs:
    jobs = connect()
    jobs.prepare(SITES)
    return jobs


def _ended(jobs: FlareJobs, job_id: str, each_time: Callable[[], object] = lambda: None) -> JobState:
    begun = time.monotonic()
    while not (state := jobs.poll(job_id)).ended:
        each_time()
        time.sleep(0.2)
        if time.monotonic() - begun > 300:
            raise TimeoutError(f"{job_id} is {state}")
    return state


def _running(jobs: FlareJobs, job_id: str) -> None:
    begun = time.monotonic()
    while not jobs.new_lines(job_id):
        assert not jobs.poll(job_id).ended
        time.sleep(0.2)
        if time.monotonic() - begun > 300:
            raise TimeoutError(f"{job_id} writes nothing")


def test_every_line_of_the_journal_comes_once_while_the_job_runs_and_after(
    jobs: FlareJobs, connect: Callable[..., FlareJobs], tmp_path: Path
) -> None:
    job_id = jobs.submit(write_job(tmp_path / "scribe", SITES, LINES, seconds_between=0.7))
    seen: list[str] = []
    state = _ended(jobs, job_id, lambda: seen.extend(jobs.new_lines(job_id)))
    assert state == JobState(ended=True, succeeded=True, status="FINISHED:COMPLETED")
    assert len(seen) > 0
    assert seen + jobs.new_lines(job_id) == LINES
    assert jobs.new_lines(job_id) == []
    assert jobs.journal(job_id) == LINES
    jobs.fetch(job_id, tmp_path / "files")
    assert (tmp_path / "files" / "journal.jsonl").read_text(encoding="utf-8").splitlines() == LINES
    assert "Server runner finished" in jobs.end_of_log(job_id, "server", lines=50)

    other = connect()  # another process, which has only the job id
    assert other.poll(job_id) == state
    assert other.new_lines(job_id) == LINES


def test_failed_job_has_ended_without_success_and_its_files_are_there(jobs: FlareJobs, tmp_path: Path) -> None:
    job_id = jobs.submit(write_job(tmp_path / "failing", SITES, LINES[:1], fails=True))
    state = _ended(jobs, job_id)
    assert not state.succeeded
    assert state.status.startswith("FINISHED")
    assert jobs.new_lines(job_id) == LINES[:1]
    assert "the scribe fails" in jobs.end_of_log(job_id, "server", lines=200)


def test_aborted_job_has_ended_when_abort_returns(jobs: FlareJobs, tmp_path: Path) -> None:
    job_id = jobs.submit(write_job(tmp_path / "long", SITES, LINES, seconds_between=600))
    _running(jobs, job_id)
    jobs.abort(job_id)
    assert jobs.poll(job_id) == JobState(ended=True, succeeded=False, status="FINISHED:ABORTED")
    jobs.abort(job_id)


def test_job_that_the_server_does_not_know_has_ended_without_success(jobs: FlareJobs, tmp_path: Path) -> None:
    job_id = "00000000-0000-0000-0000-000000000000"
    assert jobs.poll(job_id) == JobState(ended=True, succeeded=False, status="UNKNOWN")
    assert jobs.new_lines(job_id) == []
    assert jobs.journal(job_id) is None
    assert jobs.end_of_log(job_id, "server", lines=5) == ""
    jobs.abort(job_id)
    with pytest.raises(ResultLostError, match=f"no result of job {job_id}"):
        jobs.fetch(job_id, tmp_path / "files")


def test_token_stands_for_one_job_whoever_submits_it_and_whatever_its_state(
    jobs: FlareJobs, connect: Callable[..., FlareJobs], tmp_path: Path
) -> None:
    folder = write_job(tmp_path / "once", SITES, LINES[:1])
    first = jobs.submit(folder, "a-token")
    assert connect().submit(folder, "a-token") == first  # another process, while it runs
    assert jobs.submit(folder, "another-token") != first
    _ended(jobs, first)
    assert connect().submit(folder, "a-token") == first
    meta = folder / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "comment": "as another version writes it"}))
    assert jobs.submit(folder, "a-token") == first
    jobs.session.call(lambda session: session.delete_job(first))
    assert jobs.submit(folder, "a-token") == first
    assert jobs.poll(first) == JobState(ended=True, succeeded=False, status="UNKNOWN")


def test_submission_leaves_nothing_behind_but_in_its_own_folder(
    jobs: FlareJobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    folder = write_job(tmp_path / "again", SITES, LINES[:1])
    job_id = jobs.submit(folder, "one-token")
    _ended(jobs, job_id)
    assert jobs.submit(folder, "one-token") == job_id
    jobs.session.call(lambda session: session.delete_job(job_id))
    assert jobs.submit(folder, "one-token") == job_id
    assert list(temporary.iterdir()) == []
    assert tempfile.gettempdir() == str(temporary)


def test_sites_that_are_not_connected_are_named(connect: Callable[..., FlareJobs]) -> None:
    with pytest.raises(UnavailableError, match=r"site-8, site-9 are not connected .*\(it lists: site-1, site-2\)"):
        connect(timeouts=_IMPATIENT).prepare([*SITES, "site-9", "site-8"])


def test_job_may_start_without_a_site_once_enough_are_ready_and_the_missing_one_is_reported(
    connect: Callable[..., FlareJobs],
) -> None:
    told = list(connect().gather([*SITES, "site-9"], len(SITES)))
    assert told == [
        "waiting for site-9: not connected",
        "starting without site-9, which may join later: not connected",
    ]


def test_dead_site_is_noticed_before_the_server_notices(system: PocSystem, connect: Callable[..., FlareJobs]) -> None:
    connect().prepare(SITES)
    _kill(system.status().services["site-2"])
    try:
        with pytest.raises(UnavailableError, match="site-2 does not answer, though the server still lists it"):
            connect(timeouts=_IMPATIENT).prepare(SITES)
    finally:
        system.start()
    connect().prepare(SITES)


def test_unreachable_server_is_named_by_its_address(
    system: PocSystem, connect: Callable[..., FlareJobs], tmp_path: Path
) -> None:
    kit = tmp_path / "kit"
    (kit / "startup").mkdir(parents=True)
    for path in (system.admin_kit / "startup").iterdir():
        (kit / "startup" / path.name).write_bytes(path.read_bytes())
    config = json.loads((kit / "startup" / "fed_admin.json").read_text(encoding="utf-8"))
    config["admin"]["port"] = 9
    (kit / "startup" / "fed_admin.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UnavailableError, match="the server at localhost:9 did not answer for 4 s"):
        connect(kit, _IMPATIENT).prepare(SITES)


def test_folder_that_is_no_startup_kit_is_named(connect: Callable[..., FlareJobs], tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"nowhere/startup/fed_admin\.json: no such file; expected an admin"):
        connect(tmp_path / "nowhere", _IMPATIENT).prepare(SITES)
    with pytest.raises(UnavailableError, match="FEDSFT_PRODUCTION__STARTUP_KIT is not set"):
        Production(ProductionSettings(), tmp_path / "flare")


def test_study_that_the_server_does_not_have_is_refused(system: PocSystem, tmp_path: Path) -> None:
    settings = ProductionSettings(startup_kit=system.admin_kit, study="cancer", timeouts=_IMPATIENT)
    with Production(settings, tmp_path / "flare") as production, pytest.raises(UnavailableError, match="study cancer"):
        production.prepare(SITES)


def test_startup_kit_of_the_user_is_left_as_it_is(system: PocSystem, jobs: FlareJobs, tmp_path: Path) -> None:
    before = _files(system.admin_kit)
    job_id = jobs.submit(write_job(tmp_path / "kit", SITES, LINES[:1]))
    _ended(jobs, job_id)
    jobs.fetch(job_id, tmp_path / "files")
    assert _files(system.admin_kit) == before


def test_session_reconnects_after_the_server_was_restarted(system: PocSystem, jobs: FlareJobs, tmp_path: Path) -> None:
    job_id = jobs.submit(write_job(tmp_path / "before", SITES, LINES[:1]))
    state = _ended(jobs, job_id)
    pid = system.status().services[SERVER]
    _kill(pid)
    system.start()
    assert system.status().services[SERVER] not in (None, pid)
    assert jobs.poll(job_id) == state
    jobs.prepare(SITES)
    again = jobs.submit(write_job(tmp_path / "after", SITES, LINES[:1]))
    assert _ended(jobs, again).succeeded


def test_process_ends_when_its_connection_is_closed(system: PocSystem, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fedsft_assets.federation.runtimes.flare.jobs import FlareJobs\n"
        "from fedsft_assets.federation.runtimes.flare.session import FlareSession\n"
        "with FlareJobs(FlareSession(Path(sys.argv[1]), Path(sys.argv[2]))) as jobs: jobs.prepare([])\n"
        "print('done')"
    )
    command = [sys.executable, "-c", code, str(system.admin_kit), str(tmp_path / "flare")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=dict(os.environ))
    assert done.stdout == "done\n"
    assert not (tmp_path / "flare").exists()


def test_site_with_another_version_of_nvflare_is_named(
    system: PocSystem, connect: Callable[..., FlareJobs], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import nvflare\nnvflare.__version__ = '2.7.0'\n")
    other = {**home_environment(system.folder.parent), "PYTHONPATH": str(tmp_path)}
    try:
        _kill(system.status().services["site-2"])
        PocSystem(system.folder, PocSettings(), other).start()
        with pytest.raises(UnavailableError, match=r"NVFlare here is .*, but site-2 has 2\.7\.0; install the same"):
            connect().prepare(SITES)
    finally:
        _kill(system.status().services["site-2"])
        system.start()
    connect().prepare(SITES)


def _kill(pid: int | None) -> None:
    assert pid
    process = psutil.Process(pid)
    process.kill()
    process.wait(60)


def _files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}
