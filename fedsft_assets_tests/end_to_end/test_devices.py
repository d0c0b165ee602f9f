"""A site with two devices for real: torchrun inside NVFlare's trainer, two CPU processes with gloo."""

from pathlib import Path

import pytest

from fedsft_assets.federation.job_folder import build_job_folder
from fedsft_assets.federation.launch import run_job
from fedsft_assets.federation.processes import marked_processes
from fedsft_assets.federation.report import JobReport
from fedsft_assets.specs import JobSpec
from fedsft_assets.store import Store, split_file
from fedsft_assets_tests.shipped import DATASETS

from .conftest import TINY

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("nvflare")]

JOB = """
description: one site, {devices} devices
sites:
  site-1: {{dataset: alpaca}}
rounds: 2
max_local_steps: 4
max_evaluation_records: 30
training: {{devices: {devices}, strategy: ddp}}
"""


def _losses(devices: int, store: Store, folder: Path) -> list[float]:
    (folder / "wide.yaml").write_text(JOB.format(devices=devices))
    build_job_folder(JobSpec.load(folder / "wide.yaml", list(DATASETS)), TINY, store)
    report = None
    for event in run_job(
        job_folder=store.job_folder("wide"),
        workspace=store.flare("wide"),
        testing_file=split_file(store.combined, "testing"),
        into=store.checkpoint("wide"),
        threads=1,
    ):
        if isinstance(event, JobReport):
            report = event
    assert report is not None
    return [*report.val_loss, report.test_loss]


def test_two_devices_give_the_losses_of_one_and_leave_no_process(store: Store, tmp_path: Path) -> None:
    assert _losses(2, store, tmp_path) == pytest.approx(_losses(1, store, tmp_path), abs=1e-4)
    assert marked_processes(str(store.flare("wide"))) == []
