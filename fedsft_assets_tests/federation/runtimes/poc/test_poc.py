"""The lifecycle of a POC: started, repaired and stopped, on loopback only, and independent of other POCs."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from fedsft_assets.federation.protocol.journal import JOURNAL_FILE
from fedsft_assets.federation.runtimes.flare.jobs import FlareJobs
from fedsft_assets.federation.runtimes.flare.session import FlareSession
from fedsft_assets.federation.runtimes.interface import ResultLostError, UnavailableError
from fedsft_assets.federation.runtimes.poc.kits import SERVER
from fedsft_assets.federation.runtimes.poc.runtime import Poc
from fedsft_assets.federation.runtimes.poc.system import PocSystem
from fedsft_assets.federation.runtimes.processes import MARK, marked_processes
from fedsft_assets.process_env import home_environment
from fedsft_assets.settings import PROJECT
from fedsft_assets.specs.runtime import PocSettings, Timeouts
from fedsft_assets_tests.federation.small_jobs import small_jobs_allowed, write_job
from fedsft_assets_tests.sockets import Scan
from fedsft_assets_tests.watched import PLANTED, open_to_others

pytestmark = pytest.mark.slow

SITES = ["site-1", "site-2"]


def _system(home: Path, settings: PocSettings | None = None) -> PocSystem:
    return PocSystem(home / "poc", settings or PocSettings(), home_environment(home))


@pytest.fixture(scope="module", autouse=True)
def _allowed() -> Iterator[None]:
    with small_jobs_allowed():
        yield


@pytest.fixture(scope="module")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """HOME of everything that the tests of this file start."""
    home = tmp_path_factory.mktemp("empty_home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        yield home


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory, empty_home: Path) -> Iterator[PocSystem]:  # noqa: ARG001
    system = _system(tmp_path_factory.mktemp("home"))
    try:
        yield system
    finally:
        system.stop()


@pytest.fixture
def systems() -> Iterator[Callable[..., PocSystem]]:
    """POCs that are stopped when the test ends."""
    with ExitStack() as made:

        def make(home: Path, settings: PocSettings | None = None) -> PocSystem:
            system = _system(home, settings)
            made.callback(system.stop)
            return system

        yield make


@pytest.fixture
def poc(system: PocSystem, tmp_path: Path) -> Iterator[Poc]:
    """Of the module's POC, with all sites connected."""
    with Poc(system, tmp_path / "flare") as poc:
        poc.prepare(SITES)
        yield poc


def _kill(pid: int | None) -> None:
    assert pid
    process = psutil.Process(pid)
    process.kill()
    process.wait(60)


def _start_long_job(poc: Poc, folder: Path) -> str:
    job_id = poc.submit(write_job(folder, SITES, ["begun", "done"], seconds_between=600))
    while not poc.new_lines(job_id):
        assert not poc.poll(job_id).ended
        time.sleep(0.2)
    return job_id


def test_all_that_runs_listens_on_loopback_and_is_gone_when_the_job_is_aborted(
    system: PocSystem, poc: Poc, tmp_path: Path
) -> None:
    job_id = _start_long_job(poc, tmp_path / "long")
    assert system.status().jobs == [job_id]
    scan = Scan()
    scan.look(marked_processes(system.mark))
    listening = {one.program.rpartition(".")[2] for one in scan.sockets}
    assert {"server_train", "client_train"} <= listening
    assert scan.beyond_loopback == []
    assert len(system.job_processes(job_id)) == 1 + len(SITES)
    poc.abort(job_id)
    assert system.job_processes(job_id) == []
    assert system.status().jobs == []
    assert poc.poll(job_id).status == "FINISHED:ABORTED"
    assert "Worker_process started" in poc.end_of_log(job_id, "site-1", lines=200)


def test_killed_site_is_started_again_and_nothing_else(system: PocSystem, poc: Poc, tmp_path: Path) -> None:
    before = system.status().services
    _kill(before["site-2"])
    assert system.status().state == "incomplete"
    poc.prepare(SITES)
    after = system.status()
    assert after.state == "running"
    assert {name for name in before if after.services[name] != before[name]} == {"site-2"}
    job_id = poc.submit(write_job(tmp_path / "again", SITES, ["a"]))
    while not (state := poc.poll(job_id)).ended:
        time.sleep(0.2)
    assert state.succeeded


def test_new_site_joins_a_running_poc(system: PocSystem, poc: Poc) -> None:
    before = system.status().services
    poc.prepare(["site-1", "hospital"])
    after = system.status().services
    assert set(after) == {*before, "hospital"}
    assert {name: after[name] for name in before} == before


def test_job_of_a_dead_server_has_ended_when_it_is_aborted(system: PocSystem, poc: Poc, tmp_path: Path) -> None:
    job_id = _start_long_job(poc, tmp_path / "long")
    _kill(system.status().services[SERVER])
    with pytest.raises(UnavailableError, match="is not running; see `fedsft poc status`"):
        poc.poll(job_id)
    poc.abort(job_id)
    assert system.job_processes(job_id) == []
    poc.prepare(SITES)
    assert system.status().jobs == []
    while not (state := poc.poll(job_id)).ended:
        time.sleep(0.5)
    assert state.status == "LOST (the server was restarted while the job ran)"
    assert poc.new_lines(job_id) == []
    with pytest.raises(ResultLostError, match=f"has no result of job {job_id}"):
        poc.fetch(job_id, tmp_path / "files")
    poc.abort(job_id)


def test_sites_share_the_cores_and_write_nothing_to_home(system: PocSystem, poc: Poc, empty_home: Path) -> None:
    poc.prepare(SITES)
    pids = system.status().services
    share = max(1, (os.cpu_count() or 1) // (len(pids) - 1))
    for site in SITES:
        pid = pids[site]
        assert pid
        environment = psutil.Process(pid).environ()
        assert environment["OMP_NUM_THREADS"] == str(share)
        assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
        assert environment[MARK] == system.mark
    assert list(empty_home.iterdir()) == []


def test_nothing_of_a_poc_is_open_to_others_and_none_of_its_processes_knows_a_secret(
    systems: Callable[..., PocSystem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the umask of who starts it, and whatever he has exported."""
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    system = systems(tmp_path)
    code = (
        "import sys; from pathlib import Path\n"
        "from fedsft_assets.federation.runtimes.poc.system import PocSystem\n"
        "from fedsft_assets.specs.runtime import PocSettings\n"
        "from fedsft_assets_tests.federation.small_jobs import small_jobs_allowed\n"
        "with small_jobs_allowed():\n"
        "    PocSystem(Path(sys.argv[1]), PocSettings(), {}).prepare(sys.argv[2:])"
    )
    subprocess.run([sys.executable, "-c", code, str(system.folder), *SITES], umask=0, check=True, cwd=PROJECT)
    assert open_to_others(system.folder) == []
    with Poc(system, tmp_path / "flare") as poc:
        poc.prepare(SITES)
        job_id = _start_long_job(poc, tmp_path / "long")
        environments = [process.environ() for process in marked_processes(system.mark)]
        assert len(environments) >= 2 * (1 + len(SITES))
        assert [name for environment in environments for name in PLANTED.keys() & environment.keys()] == []
        poc.abort(job_id)
    assert open_to_others(system.folder) == []


def test_renewed_poc_has_another_authority_and_refuses_earlier_keys(
    systems: Callable[..., PocSystem], tmp_path: Path
) -> None:
    system = systems(tmp_path)
    with Poc(system, tmp_path / "flare") as poc:
        poc.prepare(["site-1"])
    (authority,) = (system.folder / "provision").rglob("state/cert.json")
    before, stolen = authority.read_text(), tmp_path / "stolen"
    shutil.copytree(system.admin_kit, stolen)
    system.renew()
    assert marked_processes(system.mark) == []
    assert system.status().state == "stopped"
    (authority,) = (system.folder / "provision").rglob("state/cert.json")
    assert json.loads(before)["root_pri_key"] != json.loads(authority.read_text())["root_pri_key"]
    with Poc(system, tmp_path / "flare") as poc:
        poc.prepare(["site-1"])
        config = json.loads((system.admin_kit / "startup" / "fed_admin.json").read_text())
        (stolen / "startup" / "fed_admin.json").write_text(json.dumps(config))  # whose port may be another
        thief = FlareJobs(FlareSession(stolen, tmp_path / "thief", timeouts=Timeouts(connect=10, sites=1)))
        with thief, pytest.raises(UnavailableError):
            thief.prepare(["site-1"])


def test_stopped_poc_has_no_process_and_starts_again_with_the_same_jobs(
    system: PocSystem, poc: Poc, tmp_path: Path
) -> None:
    job_id = poc.submit(write_job(tmp_path / "kept", SITES, ["a"]))
    while not (state := poc.poll(job_id)).ended:
        time.sleep(0.2)
    _start_long_job(poc, tmp_path / "long")
    assert system.stop() >= 1 + len(SITES) + 1 + len(SITES)
    assert marked_processes(system.mark) == []
    assert system.status().state == "stopped"
    assert system.stop() == 0
    poc.prepare(SITES)
    assert poc.poll(job_id) == state


def test_two_pocs_are_independent(systems: Callable[..., PocSystem], tmp_path: Path) -> None:
    one, other = systems(tmp_path / "one"), systems(tmp_path / "other")
    with Poc(one, tmp_path / "flare-one") as at_one, Poc(other, tmp_path / "flare-other") as at_other:
        one.start(["site-1"])
        other.start(["site-1"])
        at_one.prepare(["site-1"])
        at_other.prepare(["site-1"])
        assert one.status().address != other.status().address
        job_id = at_one.submit(write_job(tmp_path / "small", ["site-1"], ["a"]))
        assert at_other.poll(job_id).status == "UNKNOWN"
        before = other.status()
        one.stop()
        assert other.status() == before
        assert before.state == "running"


def test_two_processes_that_start_at_once_start_one_poc(systems: Callable[..., PocSystem], tmp_path: Path) -> None:
    system = systems(tmp_path)
    code = (
        "import sys; from pathlib import Path\n"
        "from fedsft_assets.federation.runtimes.poc.system import PocSystem\n"
        "from fedsft_assets.specs.runtime import PocSettings\n"
        "PocSystem(Path(sys.argv[1]), PocSettings(), {}).start(['site-1'])"
    )
    command = [sys.executable, "-c", code, str(system.folder)]
    starting = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in starting] == [0, 0, 0]
    running = system.status().services
    assert sorted(process.pid for process in marked_processes(system.mark)) == sorted(
        pid for pid in running.values() if pid
    )
    assert len(running) == 2


def test_site_that_cannot_start_is_named_with_what_it_printed(
    systems: Callable[..., PocSystem], tmp_path: Path
) -> None:
    system = systems(tmp_path)
    system.prepare(["site-1", "site-2"])
    resources = system.site_folder("site-2") / "local" / "resources.json"
    resources.write_text(resources.read_text(encoding="utf-8").replace('"num_of_gpus": 0', '"num_of_gpus": 99'))
    with Poc(system, tmp_path / "flare") as poc, pytest.raises(UnavailableError) as failed:
        poc.prepare(["site-1", "site-2"])
    assert str(failed.value).startswith("site-2 is not connected")
    assert "num_of_gpus specified (99) exceeds available GPUs" in str(failed.value)


def test_other_settings_restart_an_idle_poc_and_never_one_with_a_job(
    systems: Callable[..., PocSystem], tmp_path: Path
) -> None:
    system, other = systems(tmp_path), systems(tmp_path, PocSettings(threads=3))
    with Poc(system, tmp_path / "flare") as poc:
        poc.prepare(SITES)
        before = system.status()
        job_id = _start_long_job(poc, tmp_path / "long")
        with pytest.raises(UnavailableError, match="started with other settings and has 1 running job;"):
            other.start()
        assert {**before.services} == system.status().services
        poc.abort(job_id)
    other.start()
    after = other.status()
    assert set(after.services) == set(before.services)
    assert all(after.services[name] != before.services[name] for name in after.services)
    pid = after.services["site-1"]
    assert pid
    assert psutil.Process(pid).environ()["OMP_NUM_THREADS"] == "3"


def test_prepared_poc_has_kits_and_no_process(systems: Callable[..., PocSystem], tmp_path: Path) -> None:
    system = systems(tmp_path)
    assert system.status().state == "not prepared"
    system.prepare(SITES)
    assert system.status().state == "stopped"
    assert (system.admin_kit / "startup" / "fed_admin.json").is_file()
    assert marked_processes(system.mark) == []


def test_poc_whose_folder_was_removed_can_be_stopped(systems: Callable[..., PocSystem], tmp_path: Path) -> None:
    system = systems(tmp_path / "home")
    system.start(["site-1"])
    assert len(marked_processes(system.mark)) >= 2
    while (tmp_path / "home").exists():  # they write there meanwhile, and some of them may not survive it
        shutil.rmtree(tmp_path / "home", ignore_errors=True)
    assert system.status().state == "not prepared"
    system.stop()
    assert marked_processes(system.mark) == []


def test_poc_moves_to_another_port_if_its_own_was_taken(systems: Callable[..., PocSystem], tmp_path: Path) -> None:
    system = systems(tmp_path)
    system.prepare(["site-1"])
    before = system.status().address
    with socket.create_server(("127.0.0.1", int(before.rpartition(":")[2]))):
        with Poc(system, tmp_path / "flare") as poc:
            poc.prepare(["site-1"])
        assert system.status().address != before


def test_copy_of_a_home_is_a_poc_of_its_own(systems: Callable[..., PocSystem], tmp_path: Path) -> None:
    system = systems(tmp_path / "one")
    system.start(["site-1"])
    shutil.copytree(system.folder, tmp_path / "copy" / "poc", symlinks=True)
    copy = systems(tmp_path / "copy")
    assert copy.status().state == "not prepared"
    assert copy.stop() == 0
    copy.prepare(["site-1"])
    assert copy.status().address != system.status().address
    assert system.status().state == "running"


def test_job_runs_wherever_the_home_is(systems: Callable[..., PocSystem], tmp_path: Path) -> None:
    """In one path, all that a command line is split at or that a shell makes something else of."""
    home = tmp_path / "a b'c\"d$HOME;e#f&g|h*i`j`k\\l:m ü%z"
    with Poc(systems(home), home / "flare") as poc:
        poc.prepare(SITES)
        job_id = poc.submit(write_job(home / "jobs", SITES, ["begun", "done"]))
        while not poc.poll(job_id).ended:
            time.sleep(0.2)
        assert poc.poll(job_id).succeeded
        poc.fetch(job_id, home / "result")
    assert (home / "result" / JOURNAL_FILE).is_file()


@pytest.mark.parametrize(
    ("gpus", "sites", "expected"),
    [
        ("", 2, [[], []]),
        ("0,1", 2, [[0], [1]]),
        ("2", 3, [[2], [2], [2]]),
        ("4, 5", 3, [[4], [5], [4]]),
        ("0,1,2,3,4", 2, [[0, 2, 4], [1, 3]]),
    ],
)
def test_gpus_go_round_the_sites_as_in_nvflares_own_poc(gpus: str, sites: int, expected: list[list[int]]) -> None:
    from nvflare.tool.poc.poc_commands import client_gpu_assignments

    names = [f"site-{k}" for k in range(1, sites + 1)]
    settings = PocSettings(gpus=gpus)
    found = [settings.gpus_of(name, names) for name in names]
    assert found == expected
    assert found == list(client_gpu_assignments(names, settings.gpu_ids).values())


def test_kits_say_how_many_gpus_and_jobs_there_are(tmp_path: Path) -> None:
    system = _system(tmp_path, PocSettings(gpus="0,1,2", gpu_memory=16, max_jobs=2))
    system.prepare(SITES)
    site = _components(system.site_folder("site-1"))["resource_manager"]
    assert (site["num_of_gpus"], site["mem_per_gpu_in_GiB"]) == (2, 16)
    assert _components(system.site_folder("server"))["job_scheduler"]["max_jobs"] == 2
    assert PocSettings(gpus="0, 1").gpu_ids == [0, 1]


def _components(kit: Path) -> dict[str, dict[str, object]]:
    resources = json.loads((kit / "local" / "resources.json").read_text(encoding="utf-8"))
    return {component["id"]: component.get("args", {}) for component in resources["components"]}
