"""How an execution with kills differs from one of the same job without any: weights, curves, and what MLflow has."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from fedsft_assets.execution import journal_points
from fedsft_assets.federation.exchange import LAST_MODEL
from fedsft_assets.federation.journal import RoundDone, Started, from_line
from fedsft_assets.federation.metrics import Point
from fedsft_assets.federation.phases import phase_of
from fedsft_assets.federation.record import Workspace
from fedsft_assets.federation.report import JobReport
from fedsft_assets.store import Store
from fedsft_assets.tracking import Tracking
from fedsft_assets.tracking.delivery import EXECUTION_TAG
from fedsft_assets.tracking.values import JOB, distinct, value_of, values_of

_OF_WEIGHTS, _OF_LOSSES = 1e-5, 1e-4


@dataclass(frozen=True)
class Finished:
    """What is left of an execution: its global model, its journal, and the report of its checkpoint."""

    weights: dict[str, torch.Tensor]
    journal: Path
    points: list[Point]
    report: JobReport

    @classmethod
    def read(cls, workspace: Path, checkpoint: Path) -> "Finished":
        """From the folders of the workspace and the checkpoint."""
        files = Workspace(workspace)
        points = [p for p in journal_points(files.journal) if not phase_of(p.name)]
        weights = torch.load(files.result / LAST_MODEL, weights_only=True)
        return cls(weights, files.journal, points, JobReport.read(checkpoint))


def differences(expected: Finished, found: Finished) -> list[str]:
    """Empty if nothing was lost, done twice or told twice."""
    differs = []
    far = max((expected.weights[name] - found.weights[name]).abs().max().item() for name in expected.weights)
    if far > _OF_WEIGHTS:
        differs.append(f"weights differ by up to {far:.3g}")
    for name in ("samples", "tokens", "best_round", "missed"):
        if getattr(expected.report, name) != getattr(found.report, name):
            differs.append(f"{name}: {getattr(found.report, name)} instead of {getattr(expected.report, name)}")
    if doubled := [identity for identity, count in Counter(p.identity for p in found.points).items() if count > 1]:
        differs.append(f"points are there twice: {doubled[:3]}")
    values = {point.identity: point for point in found.points}
    if values.keys() != {point.identity for point in expected.points}:
        differs.append("other points than without kills")
    for point in expected.points:
        other = values.get(point.identity, point)
        behind = (point.samples, point.tokens) != (other.samples, other.tokens)
        if behind or abs(point.value - other.value) > _OF_LOSSES:
            differs.append(f"{other} instead of {point}")
    return differs + _rounds_done_again(found.journal)


def _rounds_done_again(journal: Path) -> list[str]:
    """A server that was started again went on after the last round that was done."""
    done, differs = 0, []
    for line in journal.read_text(encoding="utf-8").splitlines():
        match from_line(line):
            case RoundDone(number):
                done = max(done, number)
            case Started(finished) if finished < done:
                differs.append(f"went on after round {finished} where {done} were done")
    return differs


def differences_in_mlflow(store: Store, job: str, sites: Iterable[str]) -> list[str]:
    """What is missing of the job's last execution, or there more than once."""
    client = Tracking(store.mlflow_uri, store.mlflow_artifacts).client()
    execution = Workspace(store.flare(job)).execution()
    assert execution is not None
    everywhere = [experiment.experiment_id for experiment in client.search_experiments()]
    found = client.search_runs(everywhere, f"tags.`{EXECUTION_TAG}` = '{execution.id}'")
    runs = {run.data.tags.get("site", JOB): run for run in found}
    if runs.keys() != {JOB, *sites} or len(found) != len(runs):
        return [f"MLflow has the runs {[run.info.run_name for run in found]}"]
    unfinished = [run.info for run in found if run.info.status != "FINISHED"]
    differs = [f"the MLflow run {info.run_name} is {info.status}" for info in unfinished]
    versions = client.search_model_versions(f"run_id = '{runs[JOB].info.run_id}'")
    if len(versions) != 1:
        differs.append(f"MLflow has {len(versions)} versions of the model")
    wanted: defaultdict[tuple[str, str], Counter[Hashable]] = defaultdict(Counter)
    for point in distinct(journal_points(Workspace(store.flare(job)).journal)):
        for role, value in values_of(point):
            wanted[role, value.key][value.identity] += 1
    for role, run in runs.items():
        for key in run.data.metrics:
            kept = Counter(value_of(metric).identity for metric in client.get_metric_history(run.info.run_id, key))
            expected = wanted.pop((role, key), None)
            if kept != expected if expected else max(kept.values()) > 1 or len(kept) > 1:
                differs.append(f"MLflow has {kept.total()} values of {key} in {run.info.run_name}")
    return differs + [f"MLflow has nothing of {key} of {role or 'the job'}" for role, key in wanted]
