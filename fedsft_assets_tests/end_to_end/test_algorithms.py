"""The shipped example jobs train on the sample, whatever the algorithm, wire and filters."""

from pathlib import Path

import pytest

from fedsft_assets.federation.job_folder import build_job_folder
from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.federation.supervisor.launch import run_job
from fedsft_assets.settings import PROJECT
from fedsft_assets.specs.job import JobSpec
from fedsft_assets.store import Store, split_file
from fedsft_assets.versions import current
from fedsft_assets_tests.prepared import TINY
from fedsft_assets_tests.shipped import DATASETS

pytestmark = pytest.mark.slow

EXAMPLES = sorted((PROJECT / "jobs" / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_job_trains(path: Path, store: Store) -> None:
    spec = JobSpec.load(path, list(DATASETS)).override(rounds=3, max_local_steps=8, max_evaluation_records=32)
    build_job_folder(spec, TINY, store)
    *_, report = run_job(
        current(store.job_folder(spec.name)),
        store.flare(spec.name),
        split_file(current(store.combined), "testing"),
        store.checkpoint(spec.name),
    )
    assert isinstance(report, JobReport)
    assert report.val_loss[0] - min(report.val_loss[1:]) > 1.0, report.val_loss
    assert report.missed == {}
    assert (report.epsilon is not None) == (spec.filters.privacy is not None)
