"""An execution whose server loses its rounds: another history begins, and nothing of the two is mixed."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from fedsft_assets.execution import ExecutedJob, execute_job
from fedsft_assets.federation.protocol.events import JobError
from fedsft_assets.federation.supervisor.privacy import RELEASES_FILE, epsilon
from fedsft_assets.store import Store
from fedsft_assets.tracking import Tracking
from fedsft_assets.tracking.delivery import EXECUTION_TAG
from fedsft_assets.versions import current
from fedsft_assets_tests.faults.attempts import workspace_of
from fedsft_assets_tests.prepared import TINY

pytestmark = pytest.mark.slow

ROUNDS = 4
NOISE = 2.0


class _StoppedError(Exception):
    pass


class _StopAt(logging.Handler):
    """Stops whoever logs such a line."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def emit(self, record: logging.LogRecord) -> None:
        if self._text in record.getMessage():
            raise _StoppedError


@contextmanager
def _stops_at(text: str) -> Iterator[None]:
    handler, logger = _StopAt(text), logging.getLogger("fedsft_assets")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _execute(store: Store, job: str) -> ExecutedJob:
    tracking = Tracking(store.mlflow_uri, store.mlflow_artifacts)
    return execute_job(current(store.job_folder(job)), store, TINY, tracking, {})


def test_job_that_begins_from_zero_is_another_history_with_a_curve_and_mlflow_runs_of_its_own(
    store: Store, build: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    privacy = {"clip": 1.0, "noise_multiplier": NOISE, "delta": 1e-5, "accept_useless_noise": True}
    job = build("fedavg", rounds=ROUNDS, max_local_steps=2, max_evaluation_records=8, filters={"privacy": privacy})
    workspace = workspace_of(current(store.job_folder(job)), store, "simulator")

    caplog.set_level("INFO", "fedsft_assets")
    with _stops_at(f"round 3 of {ROUNDS}"), pytest.raises(_StoppedError):
        _execute(store, job)
    first = workspace.execution()
    assert first is not None
    assert first.rounds in (2, 3)  # by the time that it was stopped
    shutil.rmtree(workspace.runtime / "states" / first.id)

    with pytest.raises(JobError, match=rf"^history {first.id} cannot continue: its server started over") as failed:
        _execute(store, job)
    assert failed.value.retryable
    second = workspace.execution()
    assert second is not None
    assert second.id != first.id

    executed = _execute(store, job)
    report = executed.report
    assert report.history == second.id
    client = Tracking(store.mlflow_uri).client()
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    whole = {run.data.tags[EXECUTION_TAG]: run for run in runs if run.info.run_name == job}
    assert {history: run.info.status for history, run in whole.items()} == {first.id: "FAILED", second.id: "FINISHED"}
    curve = client.get_metric_history(whole[second.id].info.run_id, "val_loss")
    assert sorted((metric.step, metric.value) for metric in curve) == list(
        zip(report.samples, report.val_loss, strict=True)
    )
    # Noise has no seed, so no model after the base model is the same in both.
    others = {m.value for m in client.get_metric_history(whole[first.id].info.run_id, "val_loss")}
    assert others & set(report.val_loss) == {report.base_val_loss}

    released = json.loads((store.home / RELEASES_FILE).read_text())["site-1"]["alpaca"]
    counts = {history: entry["releases"] for history, entry in released.items()}
    assert counts.keys() == {first.id, second.id}
    assert counts[second.id] == ROUNDS
    # Its rounds, one that was cut off, and those from zero before it was noticed.
    assert first.rounds + 2 <= counts[first.id] <= first.rounds + 1 + ROUNDS
    assert report.releases == sum(counts.values())
    assert report.epsilon == epsilon([(NOISE, count) for count in counts.values()], 1e-5)
    metrics = {history: run.data.metrics for history, run in whole.items()}
    assert metrics[first.id]["releases"] == counts[first.id]
    assert metrics[first.id]["epsilon"] == pytest.approx(epsilon([(NOISE, counts[first.id])], 1e-5))
    assert (metrics[second.id]["releases"], metrics[second.id]["epsilon"]) == (report.releases, report.epsilon)
