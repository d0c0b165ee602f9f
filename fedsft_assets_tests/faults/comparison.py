"""How an execution with faults differs from one of the same job without any: weights, curves, and what MLflow has."""

import json
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from fedsft_assets.federation.job_folder import JobFolder
from fedsft_assets.federation.protocol.costs import is_cost
from fedsft_assets.federation.protocol.job_report import JobReport, global_curve
from fedsft_assets.federation.protocol.journal import JOURNAL_FILE, RoundDone, Started, from_line
from fedsft_assets.federation.protocol.messages import LAST_MODEL
from fedsft_assets.federation.protocol.points import Point
from fedsft_assets.federation.protocol.tail import Tail
from fedsft_assets.federation.server.curves import merged_val_loss
from fedsft_assets.federation.supervisor.workspace import Workspace
from fedsft_assets.specs.job import JobSpec
from fedsft_assets.store import Store, split_file
from fedsft_assets.tracking import Tracking
from fedsft_assets.tracking.delivery import EXECUTION_TAG
from fedsft_assets.tracking.journal_points import JournalPoints
from fedsft_assets.tracking.mlflow_values import JOB, value_of, values_of
from fedsft_assets.versions import current
from fedsft_assets_tests.faults.same_participation import POINTS_OF_THE_MISSING, SCORES

Missed = dict[str, list[int]]  # by site, rounds (1-based); the last score is the one after the last round


@dataclass(frozen=True)
class Result:
    """What a job gives: its last global model, the points of its curves, and what its report says by name.

    `told` are points that may be there too, of sites that missed the round.
    """

    weights: dict[str, torch.Tensor]
    points: list[Point]
    report: dict[str, Any]
    told: list[Point] = field(default_factory=list)

    @classmethod
    def of_execution(cls, workspace: Path, checkpoint: Path) -> "Result":
        """From the folders of the workspace and the checkpoint."""
        files, report = Workspace(workspace), JobReport.read(checkpoint)
        names = (*("samples", "val_loss", "tokens", "best_round", "missed"), *_SCORES)
        return cls(
            _weights(files.result),
            _of_curves(files.journal),
            {name: getattr(report, name) for name in names},
        )

    @classmethod
    def of_same_participation(cls, folder: Path, spec: JobSpec, missed: Missed) -> "Result":
        """From the folder that `same_participation` left."""
        points = _of_curves(folder / JOURNAL_FILE)
        curve = global_curve(points, spec)
        scores = json.loads((folder / SCORES).read_text(encoding="utf-8"))
        in_rounds = {site: [n for n in rounds if n <= spec.rounds] for site, rounds in missed.items()}
        report = {
            **{name: getattr(curve, name) for name in ("samples", "val_loss", "tokens", "best_round")},
            "missed": {site: rounds for site, rounds in in_rounds.items() if rounds},
            "test_loss": scores["test_loss"],
            "perplexity": scores["perplexity"],
            "checkpoint_digest": scores["digest"],
        }
        told = [Point(**one) for one in json.loads((folder / POINTS_OF_THE_MISSING).read_text(encoding="utf-8"))]
        return cls(_weights(folder), points, report, told)

    def missed(self, spec: JobSpec) -> Missed:
        """Who missed what, as far as the job allows it."""
        missed: Missed = {site: list(rounds) for site, rounds in self.report["missed"].items()}
        last = {p.site: p for p in self.points if p.name == "val_loss" and p.round == spec.rounds}
        sites, at_least = sorted(spec.sites), spec.min_sites or len(spec.sites)
        for count in range(len(sites), at_least - 1, -1):
            for those in combinations(sites, count):
                scores = [last[site] for site in those if site in last]
                if len(scores) == count and merged_val_loss(scores, spec.rounds, 0).value == last[None].value:
                    for site in set(sites) - set(those):
                        missed.setdefault(site, []).append(spec.rounds + 1)
                    return missed
        return missed


_SCORES = ("test_loss", "perplexity", "checkpoint_digest")


def with_same_participation(store: Store, job: str, missed: Missed, threads: int, into: Path) -> Result:
    """What the job gives when these sites miss these rounds and each trainer has so many threads."""
    folder = current(store.job_folder(job))
    spec = JobFolder.read(folder).spec
    if not (into / SCORES).is_file():
        module = "fedsft_assets_tests.faults.same_participation"
        arguments = [
            str(folder),
            str(split_file(current(store.combined), "testing")),
            json.dumps(missed),
            str(threads),
            str(into),
        ]
        done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{job} without {missed} cannot be computed:\n{done.stderr[-4000:]}")
    return Result.of_same_participation(into, spec, missed)


def differences(expected: Result, found: Result) -> list[str]:
    """Empty if nothing was lost, done twice or told twice: all numbers are the same to the bit."""
    differs = []
    if expected.weights.keys() != found.weights.keys():
        differs.append("other tensors")
    elif not all(torch.equal(tensor, found.weights[name]) for name, tensor in expected.weights.items()):
        far = max((tensor - found.weights[name]).abs().max().item() for name, tensor in expected.weights.items())
        differs.append(f"weights differ by up to {far:.3g}")
    for name, value in expected.report.items():
        if found.report[name] != value:
            differs.append(f"{name}: {found.report[name]} instead of {value}")
    if doubled := [identity for identity, count in Counter(p.identity for p in found.points).items() if count > 1]:
        differs.append(f"points are there twice: {doubled[:3]}")
    values = {point.identity: point for point in found.points}
    known = {point.identity: point for point in [*expected.told, *expected.points]}
    if lost := {point.identity for point in expected.points} - values.keys():
        differs.append(f"{len(lost)} points are missing: {sorted(map(str, lost))[:3]}")
    if more := values.keys() - known.keys():
        differs.append(f"{len(more)} points of nothing: {sorted(map(str, more))[:3]}")
    others = [point for identity, point in values.items() if identity in known and point != known[identity]]
    differs += [f"{point} instead of {known[point.identity]}" for point in others[:3]]
    return differs


def rounds_done_again(journal: Path) -> list[str]:
    """A server that was started again went on after the last round that was done."""
    done, differs = 0, []
    for line in journal.read_text(encoding="utf-8").splitlines():
        match from_line(line):
            case RoundDone(number):
                done = max(done, number)
            case Started(finished) if finished < done:
                differs.append(f"went on after round {finished} where {done} were done")
    return differs


def differences_in_mlflow(store: Store, workspace: Workspace, sites: Iterable[str]) -> list[str]:
    """What is missing of the workspace's last execution, or there more than once."""
    client = Tracking(store.mlflow_uri, store.mlflow_artifacts).client()
    execution = workspace.execution()
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
    models = client.search_logged_models(everywhere, f"tags.`{EXECUTION_TAG}` = '{execution.id}'")
    if [model.status for model in models] != ["READY"]:
        differs.append(f"MLflow has the logged models {[(model.model_id, str(model.status)) for model in models]}")
    wanted: defaultdict[tuple[str, str], Counter[Hashable]] = defaultdict(Counter)
    for point in JournalPoints(workspace.journal).read():
        for role, value in values_of(point):
            wanted[role, value.key][value.identity] += 1
    for role, run in runs.items():
        for key in run.data.metrics:
            kept = Counter(value_of(metric).identity for metric in client.get_metric_history(run.info.run_id, key))
            expected = wanted.pop((role, key), None)
            if kept != expected if expected else max(kept.values()) > 1 or len(kept) > 1:
                differs.append(f"MLflow has {kept.total()} values of {key} in {run.info.run_name}")
    return differs + [f"MLflow has nothing of {key} of {role or 'the job'}" for role, key in wanted]


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = torch.load(folder / LAST_MODEL, weights_only=True)
    return loaded


def _of_curves(journal: Path) -> list[Point]:
    """Points as they stand in a journal, also those that are there twice."""
    entries = map(from_line, Tail(journal).new_lines())
    return [entry for entry in entries if isinstance(entry, Point) and not is_cost(entry.name)]
