"""What sites have spent of their privacy, in a real MLflow over a SQLite store, however an execution ended."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedsft_assets.execution import close_abandoned, privacy_spent
from fedsft_assets.federation.supervisor.privacy import RELEASES_FILE, Releases, epsilon
from fedsft_assets.federation.supervisor.workspace import Workspaces
from fedsft_assets.store import Store
from fedsft_assets.tracking import Outbox, TrackedJob, Tracking
from fedsft_assets_tests.tracking.examples import REPORT, SITES, curve, job_points, runs, statuses, track, write

DATASETS = dict(zip(SITES, ["alpaca", "dolly"], strict=True))
PARAMS = {
    "filters.privacy.clip": 1.0,
    "filters.privacy.noise_multiplier": 2.0,
    "filters.privacy.delta": 1e-5,
    "site.site-1": "alpaca",
    "site.site-2": "dolly",
}


@pytest.fixture
def releases(store: Store) -> Releases:
    return Releases(store.home / RELEASES_FILE)


def _track(tracking: Tracking, store: Store, execution: str, **others: Any) -> TrackedJob:
    return track(tracking, store, execution, params=PARAMS, spent=lambda of: privacy_spent(store, of), **others)


def _fail(tracking: Tracking, store: Store, execution: str, error: BaseException, **others: Any) -> None:
    def run() -> None:
        with _track(tracking, store, execution, **others):
            raise error

    with pytest.raises(type(error)):
        run()


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("trainer died"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_attempt_that_ends_early_has_what_its_sites_have_spent(
    tracking: Tracking,
    store: Store,
    releases: Releases,
    error: BaseException,
    status: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    releases.charge({"site-2": "dolly"}, "of an earlier job", 1.0, 4)
    releases.charge(DATASETS, "first", 2.0, 3)
    caplog.set_level("INFO", "fedsft_assets")
    _fail(tracking, store, "first", error)
    run = runs(tracking)["fedavg"]
    assert run.info.status == status
    # Of the site that has spent most, all that ever left it.
    assert run.data.metrics == {"epsilon": pytest.approx(epsilon([(1.0, 4), (2.0, 3)], 1e-5)), "releases": 7}
    assert caplog.messages == [
        f"fedavg · privacy spent so far: epsilon {run.data.metrics['epsilon']:.4g} in 7 releases"
    ]


def test_last_value_is_that_of_the_last_attempt(
    tracking: Tracking, store: Store, releases: Releases, checkpoint: Path
) -> None:
    releases.charge(DATASETS, "first", 2.0, 3)
    _fail(tracking, store, "first", RuntimeError("trainer died"))
    releases.charge(DATASETS, "first", 2.0, 5)
    write(store, job_points()[:2])
    with _track(tracking, store, "first") as job:
        report = replace(REPORT, epsilon=epsilon([(2.0, 5)], 1e-5), releases=5)
        job.finish(report, checkpoint, [], model="fedsft-tiny", data="data")
    metrics = runs(tracking)["fedavg"].data.metrics
    assert (metrics["epsilon"], metrics["releases"]) == (report.epsilon, 5)
    assert sorted(value for _, value in curve(tracking, "fedavg", "releases")) == [3, 5]


def test_execution_whose_process_died_has_it_too(tracking: Tracking, store: Store, releases: Releases) -> None:
    releases.charge(DATASETS, "first", 2.0, 3)
    workspace = Workspaces(store.flare("fedavg")).of({"job": "fedavg"})
    workspace.folder.mkdir(parents=True)
    dead = _track(tracking, store, "first", record=workspace.tracking_record)
    dead._delivery._given_up.set()  # what is left of a process that was killed
    dead._delivery.join()
    close_abandoned(store, "fedavg")
    Outbox(store.outbox).deliver(tracking)
    assert set(statuses(tracking).values()) == {"KILLED"}
    assert runs(tracking)["fedavg"].data.metrics["epsilon"] == epsilon([(2.0, 3)], 1e-5)


def test_record_of_releases_that_cannot_be_read_hides_no_failure(
    tracking: Tracking, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    (store.home / RELEASES_FILE).write_text("[]")
    _fail(tracking, store, "first", RuntimeError("trainer died"))
    assert statuses(tracking)["fedavg"] == "FAILED"
    (said,) = caplog.messages
    assert said.startswith(
        f"fedavg · the privacy spent is missing in MLflow: {store.home / RELEASES_FILE}: not a valid"
    )


def test_job_without_noise_has_no_epsilon(tracking: Tracking, store: Store, checkpoint: Path) -> None:
    with track(tracking, store, spent=lambda of: privacy_spent(store, of)) as job:
        job.finish(REPORT, checkpoint, [], model="fedsft-tiny", data="data")
    assert privacy_spent(store, job._execution) == {}
    assert "epsilon" not in runs(tracking)["fedavg"].data.metrics
