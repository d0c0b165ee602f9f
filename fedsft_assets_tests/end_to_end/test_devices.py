"""A site with two devices for real: torchrun inside NVFlare's trainer, two CPU processes with gloo."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedsft_assets.federation.job_folder import JobFolder, build_job_folder
from fedsft_assets.federation.protocol.events import Event, JobError
from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.federation.protocol.journal import Progress
from fedsft_assets.federation.runtimes.processes import marked_processes
from fedsft_assets.federation.supervisor.launch import run_job
from fedsft_assets.specs.job import JobSpec
from fedsft_assets.specs.runtime import RuntimeSettings
from fedsft_assets.store import Store, split_file
from fedsft_assets.versions import current
from fedsft_assets_tests.prepared import TINY
from fedsft_assets_tests.shipped import DATASETS
from fedsft_assets_tests.sockets import Scan

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5

JOB = """
description: one site, {devices} devices
sites:
  site-1: {{dataset: alpaca}}
rounds: {rounds}
max_local_steps: 4
max_evaluation_records: 30
training: {{devices: {devices}, strategy: {strategy}}}
"""


def _start(store: Store, folder: Path, devices: int, strategy: str = "ddp", rounds: int = 2) -> Iterator[Event]:
    (folder / "wide.yaml").write_text(JOB.format(devices=devices, strategy=strategy, rounds=rounds))
    build_job_folder(JobSpec.load(folder / "wide.yaml", list(DATASETS)), TINY, store)
    return run_job(
        job=current(store.job_folder("wide")),
        workspace=store.flare("wide"),
        testing_file=split_file(current(store.combined), "testing"),
        into=store.checkpoint("wide"),
        runtime=RuntimeSettings(threads_per_trainer=1),
    )


def _losses(*args: Any) -> list[float]:
    *_, report = _start(*args)
    assert isinstance(report, JobReport)
    return [*report.val_loss, report.test_loss]


def _trainers(store: Store) -> list[psutil.Process]:
    """Torchrun and what it started."""
    found = []
    for process in marked_processes(str(store.flare("wide"))):
        with contextlib.suppress(psutil.Error):  # it ended since it was listed
            if "fedsft_assets.federation.site.process" in process.cmdline():
                found.append(process)
    return found


def test_two_devices_give_the_losses_of_one_and_leave_no_process(store: Store, tmp_path: Path) -> None:
    one = _losses(store, tmp_path, 1)
    for strategy in ("ddp", "fsdp"):
        assert _losses(store, tmp_path, 2, strategy) == pytest.approx(one, abs=TOLERANCE)
        assert marked_processes(str(store.flare("wide"))) == []


def test_a_killed_device_ends_the_job_and_none_listened_to_the_network(store: Store, tmp_path: Path) -> None:
    scan = Scan()
    killed: list[psutil.Process] = []

    def kill_one() -> None:
        for event in _start(store, tmp_path, 2, "ddp", 500):
            if isinstance(event, Progress) and "step" in event.text and not killed:
                trainers = _trainers(store)
                scan.look(trainers)
                killed.extend(trainer for trainer in trainers if trainer.environ().get("RANK") == "1")
                killed[0].kill()

    with pytest.raises(JobError, match=r"the trainer of site-1 failed:\n.*killed by signal 9 \(SIGKILL\)"):
        kill_one()
    assert len(killed) == 1
    assert scan.sockets
    assert scan.beyond_loopback == []
    assert marked_processes(str(store.flare("wide"))) == []


def test_a_failing_device_shows_its_own_traceback(store: Store, tmp_path: Path) -> None:
    events = _start(store, tmp_path, 2)
    plan = JobFolder.read(current(store.job_folder("wide"))).located_plans[0]
    plan.training_file.write_text(plan.training_file.read_text() + "\n")
    with pytest.raises(JobError) as failure:
        list(events)
    assert "the trainer of site-1 failed:\nTraceback (most recent call last)" in str(failure.value)
    assert f"{plan.training_file} has changed; build the job folder again" in str(failure.value)
    assert marked_processes(str(store.flare("wide"))) == []
