"""Starting, finding and killing the processes of a POC, with kits whose start script only sleeps."""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from fedsft_assets.federation.protocol.messages import STATE_ROOT
from fedsft_assets.federation.runtimes.poc.kits import SERVER, PocKits
from fedsft_assets.federation.runtimes.poc.services import PocServices
from fedsft_assets.federation.runtimes.poc.state import PocRecord, PocStatus, Service
from fedsft_assets.federation.runtimes.processes import MARK, marked_processes
from fedsft_assets.specs.runtime import PocSettings

SITES = ["site-1", "site-2"]


@pytest.fixture
def services(tmp_path: Path) -> Iterator[PocServices]:
    settings = PocSettings(threads=3, gpus="4,5")
    kits = PocKits(tmp_path, settings)
    for name in (SERVER, *SITES):
        script = kits.of(name) / "startup" / "sub_start.sh"
        script.parent.mkdir(parents=True)
        script.write_text("#!/bin/sh\nexec sleep 600\n", encoding="utf-8")
        script.chmod(0o700)
    services = PocServices(tmp_path, kits, settings, {"FEDSFT_HOME": "/somewhere"})
    yield services
    services.stop()


def test_server_and_sites_have_the_environment_of_their_role(
    services: PocServices, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(STATE_ROOT, "of the job that started the POC")
    server, site = (_environment(services.launch(name, SITES)) for name in (SERVER, "site-2"))
    for environment in (server, site):
        assert environment[MARK] == services.mark
        assert environment["FEDSFT_HOME"] == "/somewhere"
        assert STATE_ROOT not in environment
    assert server["TMPDIR"] == str(tmp_path / "temporary")
    assert (site["OMP_NUM_THREADS"], site["CUDA_VISIBLE_DEVICES"]) == ("3", "5")


def _environment(service: Service) -> dict[str, str]:
    process = psutil.Process(service.pid)
    while process.name() != "sleep" or MARK not in process.environ():
        time.sleep(0.01)
    return process.environ()


def test_service_is_running_until_it_ends_and_another_process_with_its_pid_is_not_it(services: PocServices) -> None:
    service = services.launch("site-1", SITES)
    assert _environment(service)[MARK] == services.mark
    assert service.is_running
    assert not replace(service, created=service.created - 60).is_running
    assert services.stop() == 1
    assert not service.is_running
    assert marked_processes(services.mark) == []


def test_processes_of_a_job_are_found_by_their_command_line_or_folder_and_killed(
    services: PocServices, tmp_path: Path
) -> None:
    site = services.launch("site-1", SITES)
    _environment(site)
    (tmp_path / "job-1").mkdir()
    environment = services.environment()
    part = psutil.Popen(["sh", "-c", "sleep 600; :", "nvflare.worker", "-n", "job-1"], env=environment)
    trainer = psutil.Popen(["sleep", "600"], env=environment, cwd=tmp_path / "job-1")
    try:
        while len(part.children()) == 0:
            time.sleep(0.01)
        assert services.running_jobs() == ["job-1"]
        assert {process.pid for process in services.job_processes("job-1")} >= {part.pid, trainer.pid}
        services.kill_job("job-1")
        assert services.job_processes("job-1") == []
        assert services.running_jobs() == []
        assert site.is_running
    finally:
        for process in (part, trainer):
            process.kill()
            process.wait()


def test_record_is_read_back_by_the_folder_that_it_was_written_for(tmp_path: Path) -> None:
    folder = tmp_path / "poc"
    folder.mkdir()
    assert PocRecord.read(folder) is None
    own = Service(os.getpid(), psutil.Process().create_time())
    record = PocRecord(str(folder), 8102, SITES, {"threads": 3}, "2.9.0", 1.0, {SERVER: own, "site-1": Service(1, 0)})
    record.write()
    assert PocRecord.read(folder) == record
    assert [name for name in record.service_names if record.running(name)] == [SERVER]
    folder.rename(tmp_path / "moved")
    assert PocRecord.read(tmp_path / "moved") is None


def test_status_says_what_runs(tmp_path: Path) -> None:
    assert PocStatus(tmp_path, "", {}).state == "not prepared"
    status = PocStatus(tmp_path, "127.0.0.1:8102", {SERVER: 11, "site-1": None}, ["job-1"])
    assert status.state == "incomplete"
    assert status.describe().splitlines() == [
        f"POC in {tmp_path}: incomplete",
        "server 127.0.0.1:8102",
        "server     pid 11",
        "site-1     not running",
        "job        job-1",
    ]
