"""More sites than this machine has cores: their trainers take turns."""

import os

import pytest

from fedsft_assets.federation.job_folder import build_job_folder
from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.federation.protocol.points import Point
from fedsft_assets.federation.supervisor.launch import run_job
from fedsft_assets.settings import PROJECT
from fedsft_assets.specs.job import JobSpec, SiteSpec
from fedsft_assets.store import Store, split_file
from fedsft_assets.versions import current
from fedsft_assets_tests.prepared import TINY
from fedsft_assets_tests.shipped import DATASETS

pytestmark = pytest.mark.slow


def test_only_as_many_sites_train_at_once_as_there_are_cores(store: Store) -> None:
    cores = os.cpu_count() or 1
    sites = [f"site-{number}" for number in range(1, 3 * cores + 2)]
    spec = JobSpec.load(PROJECT / "jobs" / "fedavg.yaml", list(DATASETS)).override(
        rounds=1, max_local_steps=1, max_evaluation_records=4
    )
    spec = spec.model_copy(update={"sites": {site: SiteSpec(dataset="dolly") for site in sites}})
    build_job_folder(spec, TINY, store)
    *events, report = run_job(
        current(store.job_folder("fedavg")),
        store.flare("fedavg"),
        split_file(current(store.combined), "testing"),
        store.checkpoint("fedavg"),
    )
    assert isinstance(report, JobReport)
    assert report.samples == [0, len(sites) * TINY.batch_size]
    points = [event for event in events if isinstance(event, Point) and event.site]
    begun = {point.site: point.time for point in points if point.name == "val_loss" and point.round == 0}
    ended = {point.site: point.time for point in points if point.name == "val_loss_local"}
    assert sorted(begun) == sorted(ended) == sorted(sites)
    for moment in begun.values():
        assert sum(begun[site] <= moment < ended[site] for site in sites) <= cores
