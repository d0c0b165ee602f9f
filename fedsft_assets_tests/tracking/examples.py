"""A job of two sites and two rounds, as tests of tracking track it."""

import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mlflow.entities import Run

from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.federation.protocol.journal import Journal
from fedsft_assets.federation.protocol.points import Point
from fedsft_assets.federation.supervisor.workspace import Workspace
from fedsft_assets.store import Store
from fedsft_assets.tracking import EXPERIMENT, TrackedJob, Tracking
from fedsft_assets.tracking.mlflow_values import JOB, values_of

SITES = ["site-1", "site-2"]
ROUNDS = 2
BEGUN = 1_700_000_000.125
REPORT = JobReport(
    job="fedavg",
    kind="federated",
    rounds=ROUNDS,
    best_round=1,
    tokens=700,
    samples=[0, 64, 128],
    val_loss=[7.0, 2.0, 2.5],
    test_loss=2.25,
    perplexity=9.4877,
    seconds=12.5,
    phases={"train": 1.0},
    checkpoint_digest="c" * 64,
    base_model_digest="b" * 64,
    validation_digest="v" * 64,
    runtime="simulator",
    job_id="job",
    status="finished",
    missed={},
    steps=8,
    traffic={"site-1": {"sent": 100, "received": 150}, "site-2": {"sent": 120, "received": 150}},
    cpu_seconds=20.5,
    peak_memory=700_000_000,
    elapsed=[1.0, 2.0, 3.0],
    transferred=[100, 300, 520],
)
RESULTS = {
    "test_loss": 2.25,
    "perplexity": 9.4877,
    "best_val_loss": 2.0,
    "last_val_loss": 2.5,
    "base_val_loss": 7.0,
    "tokens_trained": 700,
    "seconds": 12.5,
    "system/train_seconds": 1.0,
    "steps": 8.0,
    "system/sent_bytes": 220.0,
    "system/received_bytes": 300.0,
    "system/cpu_seconds": 20.5,
    "system/peak_memory_bytes": 700_000_000.0,
}


def job_points(rounds: int = ROUNDS) -> list[Point]:
    """What a job writes down, in its order: a model is scored when a round ends. One point a second."""
    times: Iterator[float] = (BEGUN + i for i in range(10**9))
    points: list[Point] = []

    def add(name: str, value: float, k: int, samples: int, site: str | None = None, step: int | None = None) -> None:
        points.append(Point(name, value, k, samples, site, step, 100 if step else None, time=next(times)))

    for k in range(rounds + 1):
        loss = REPORT.val_loss[k % 3] + k // 3
        add("val_loss", loss, k, 64 * k)
        for site in SITES:
            add("val_loss", loss, k, 32 * k, site)
        if k < rounds:
            for step in (1, 2):
                seen = 32 * k + 16 * step
                for site in SITES:
                    add("train_loss", 5 - k - step / 10, k + 1, seen, site, step)
                add("train_loss", 5 - k - step / 10, k + 1, 2 * seen, None, step)
    for site in SITES:
        add("system/train_seconds", 1.5, rounds, 32 * rounds, site)
        add("system/sent_bytes", 110.0, rounds, 32 * rounds, site)
    add("system/server_cpu_seconds", 0.5, rounds, 64 * rounds)
    return points


def tracking_record(store: Store) -> Path:
    """What is known of the last execution."""
    return Workspace(store.flare("fedavg") / "workspace").tracking_record


def journal_file(store: Store) -> Path:
    """The copy of the journal of the last execution."""
    return Workspace(store.flare("fedavg") / "workspace").journal


def write(store: Store, points: Iterable[Point]) -> None:
    """Have points in the journal."""
    Journal(journal_file(store)).add(points)


def track(tracking: Tracking, store: Store, execution_id: str = "", **others: Any) -> TrackedJob:
    """A new execution unless its id is given."""
    params = others.pop("params", {"rounds": ROUNDS, "learning_rate": 4e-3, "max_local_steps": None})
    given = {
        "tags": {"dagster.run_id": "abc"},
        "note": "FedAvg over two",
        "record": tracking_record(store),
        "journal": journal_file(store),
        **others,
    }
    return TrackedJob(tracking, store, "fedavg", execution_id or uuid.uuid4().hex, SITES, params, **given)


def finish(job: TrackedJob, checkpoint: Path) -> Any:
    return job.finish(REPORT, checkpoint, [checkpoint / "report.json"], model="fedsft-tiny", data="data")


def runs(tracking: Tracking) -> dict[str, Run]:
    """All MLflow runs by name; two of one name are an error."""
    client = tracking.client()
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return {}
    found = client.search_runs([experiment.experiment_id])
    assert len({run.info.run_name for run in found}) == len(found), f"runs are there twice: {found}"
    return {run.info.run_name: run for run in found}


def statuses(tracking: Tracking) -> dict[str, str]:
    return {name: run.info.status for name, run in runs(tracking).items()}


def curve(tracking: Tracking, run: str, name: str) -> list[tuple[int, float]]:
    """Step and value of one metric of the MLflow run with this name."""
    found = runs(tracking).get(run)
    if found is None:
        return []
    return sorted((m.step, m.value) for m in tracking.client().get_metric_history(found.info.run_id, name))


def stored(tracking: Tracking) -> list[tuple[str, str, int, int, str]]:
    """Every value that MLflow has but the results: run, metric, step, milliseconds and value. Sorted, with repeats."""
    client = tracking.client()
    return sorted(
        (name, m.key, m.step, m.timestamp, repr(m.value))
        for name, run in runs(tracking).items()
        for key in run.data.metrics
        if name != "fedavg" or key not in RESULTS
        for m in client.get_metric_history(run.info.run_id, key)
    )


def expected(points: Iterable[Point]) -> list[tuple[str, str, int, int, str]]:
    """The same for these points, each once."""
    return sorted(
        ("fedavg" if role == JOB else f"fedavg {role}", v.key, v.step, v.timestamp, repr(v.value))
        for point in points
        for role, v in values_of(point)
    )


def until(is_so: Callable[[], object], what: str) -> None:
    """Wait until it is so; an error after a minute and a half."""
    deadline = time.monotonic() + 90
    while not is_so():
        assert time.monotonic() < deadline, f"not in 90 s: {what}"
        time.sleep(0.05)
