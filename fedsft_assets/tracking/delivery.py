"""Delivers one execution of a job to MLflow, in steps that can be repeated after any failure.

If the outcome of a call is unknown (timeout, broken connection), MLflow is read back before anything is sent again. A
request that is processed late does no harm: MLflow's database merges values with the same name, step, time and value.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fedsft_assets.federation.protocol.points import Point
from fedsft_assets.tracking.datasets import dataset_inputs, scored_split
from fedsft_assets.tracking.mlflow_store import Tracking
from fedsft_assets.tracking.mlflow_values import JOB, Value, value_of, values_of
from fedsft_assets.tracking.record import Ending, TrackedExecution
from fedsft_assets.tracking.registry import EXECUTION_TAG, ModelRegistry

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

_METRICS = 500  # per call; MLflow's limits are 1,000 and 1 MB
_PARAMS = 100  # per call: MLflow's limit
_READINGS = 5

_Item = TypeVar("_Item")


class NotKeptError(RuntimeError):
    """MLflow accepts values but does not store them."""


class Delivery:
    """Tracks what MLflow should have of an execution, and what it is known to have.

    `save` is called when the execution's record changes. Any method may raise MLflow's errors; call `open` again
    afterwards.
    """

    def __init__(
        self, tracking: Tracking, execution: TrackedExecution, save: Callable[[TrackedExecution], object]
    ) -> None:
        self._tracking = tracking
        self._execution = execution
        self._save = save
        self.experiment = ""
        self._known_points: set[Hashable] = set()
        self._wanted: defaultdict[str, dict[Hashable, Value]] = defaultdict(dict)
        self._unsent: defaultdict[str, dict[Hashable, Value]] = defaultdict(dict)
        self._uncertain: set[str] = set()
        self._done: set[str] = set()
        self.progress = 0  # grows with every step that need not be repeated
        self.version: str | None = None

    def add(self, points: Iterable[Point]) -> None:
        """Queue points for delivery, skipping known identities."""
        for point in points:
            if point.identity in self._known_points:
                continue
            self._known_points.add(point.identity)
            for role, value in values_of(point):
                if value.identity not in self._wanted[role]:
                    self._wanted[role][value.identity] = self._unsent[role][value.identity] = value

    def open(self, running: bool) -> None:
        """Find or create the MLflow runs with their parameters, datasets and tags. Call first, and after every failure.

        `running`: the job is still running.
        """
        client = self._tracking.client()
        self.experiment = self._tracking.experiment_id()
        found = self._find(client)
        for role in (JOB, *self._execution.sites):
            candidates = found.get(role, {})
            run = candidates.get(self._execution.runs.get(role, "")) or next(iter(candidates.values()), None)
            if run is None:
                run = self._create(client, role)
            else:
                self._uncertain.add(role)
                self._renew(client, run, running)
            if self._execution.runs.get(role) != run.info.run_id:
                self._execution.runs = {**self._execution.runs, role: run.info.run_id}
                self._unsent[role] = dict(self._wanted[role])
                self._done.clear()
                self._save(self._execution)
        self._once("parameters", partial(self._log_params, client))
        if self._execution.splits:
            inputs = dataset_inputs(self._execution.splits)
            self._once("datasets", partial(client.log_inputs, self._execution.runs[JOB], inputs))

    def send(self) -> None:
        """Send everything that MLflow is not known to have."""
        client = self._tracking.client()
        for role in (JOB, *self._execution.sites):
            unsent = self._unsent[role]
            if unsent and role in self._uncertain:
                self._read_back(client, role, unsent)
            for values in _batches(list(unsent.values()), _METRICS):
                self._uncertain.add(role)
                client.log_batch(self._execution.runs[role], metrics=[value.metric for value in values])
                self._uncertain.discard(role)
                self.progress += 1
                for value in values:
                    del unsent[value.identity]

    def reconcile(self) -> None:
        """Read everything back and resend what is missing. Raises NotKeptError if values keep missing."""
        self._once("points", self._reconcile)

    def _reconcile(self) -> None:
        client = self._tracking.client()
        for _ in range(_READINGS):
            self.send()
            for role, wanted in self._wanted.items():
                self._unsent[role] = dict(wanted)
                self._read_back(client, role, wanted)
            if not any(self._unsent.values()):
                return
        missing = sum(map(len, self._unsent.values()))
        raise NotKeptError(
            f"MLflow accepted {missing} values of job {self._execution.job} {_READINGS} times but does not store them"
        )

    def end(self, ending: Ending, artifacts: Iterable[Path]) -> str | None:
        """Log the results, register the checkpoint and end the MLflow runs; returns the model version, if any.

        Each step is done once per execution: a repeated call continues where the last one failed.
        """
        client = self._tracking.client()
        run_id, model = self._execution.runs[JOB], None
        if what := ending.registration:
            most = self._tracking.largest_upload
            registry = ModelRegistry(client, self.experiment, self._execution, run_id, ending, what, most)
            model = registry.logged_model()
        self._once("results", partial(self._log_results, client, ending, model))
        for artifact in artifacts:
            self._once(f"artifact {artifact.name}", partial(client.log_artifact, run_id, str(artifact)))
        if model:
            registry.publish(model, self._once)
            self.version = registry.version(model)
            self._once("stray models", partial(registry.remove_strays, model.model_id))
        self._once("strays", partial(self._remove_strays, client))
        for role in (*self._execution.sites, JOB):
            of_role, at = self._execution.runs[role], round(ending.at * 1000)
            self._once(f"status {role}", partial(client.set_terminated, of_role, ending.status, at))
        return self.version

    def _once(self, step: str, do: Callable[[], object]) -> None:
        if step not in self._done:
            do()
            self._done.add(step)
            self.progress += 1

    def _log_results(self, client: MlflowClient, ending: Ending, model: LoggedModel | None) -> None:
        """Log the results, which belong to the model and to the splits that it was scored on, too."""
        from mlflow.entities import Metric, RunTag

        run_id, at = self._execution.runs[JOB], round(ending.at * 1000)
        existing = {
            Value(name, metric.value, at, 0).identity
            for name in ending.results
            for metric in client.get_metric_history(run_id, name)
        }
        of_model = {metric.key for metric in model.metrics or []} if model else set(ending.results)
        metrics = []
        for name, number in ending.results.items():
            value = Value(name, number, at, 0)  # MLflow shows values at step 0 as bars
            if value.identity not in existing or name not in of_model:  # what the run has already is merged
                scored_on = scored_split(name, ending.registration.data) if ending.registration else (None, None)
                metrics.append(Metric(name, number, at, 0, model.model_id if model else None, *scored_on))
        client.log_batch(run_id, metrics=metrics, tags=[RunTag(k, v) for k, v in ending.tags.items()])

    def _find(self, client: MlflowClient) -> dict[str, dict[str, Run]]:
        """The MLflow runs with this execution's tag, by role and run id, oldest first."""
        found: defaultdict[str, dict[str, Run]] = defaultdict(dict)
        query = f"tags.`{EXECUTION_TAG}` = '{self._execution.id}'"
        for run in client.search_runs([self.experiment], query, order_by=["attributes.start_time ASC"]):
            found[run.data.tags.get("site", JOB)][run.info.run_id] = run
        return found

    def _create(self, client: MlflowClient, role: str) -> Run:
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE

        execution = self._execution
        tags = {**execution.tags, EXECUTION_TAG: execution.id}
        if role == JOB:
            name, own = execution.job, {MLFLOW_RUN_NOTE: execution.note}
        else:
            name = f"{execution.job} {role}"
            own = {"site": role, MLFLOW_PARENT_RUN_ID: execution.runs[JOB]}
        return client.create_run(self.experiment, round(execution.begun * 1000), {**tags, **own}, name)

    def _renew(self, client: MlflowClient, run: Run, running: bool) -> None:
        """Update an existing run's tags for this attempt, and set it to RUNNING if it had ended."""
        from mlflow.entities import RunTag

        changed = {k: v for k, v in self._execution.tags.items() if run.data.tags.get(k) != v}
        if changed:
            client.log_batch(run.info.run_id, tags=[RunTag(k, v) for k, v in changed.items()])
        if running and run.info.status != "RUNNING":
            client.update_run(run.info.run_id, status="RUNNING")

    def _log_params(self, client: MlflowClient) -> None:
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in self._execution.params.items()]
        for batch in _batches(params, _PARAMS):
            client.log_batch(self._execution.runs[JOB], params=batch)

    def _read_back(self, client: MlflowClient, role: str, values: dict[Hashable, Value]) -> None:
        """Remove from the unsent values those that MLflow already has under the same names."""
        run_id = self._execution.runs[role]
        for key in {value.key for value in values.values()}:
            for metric in client.get_metric_history(run_id, key):
                self._unsent[role].pop(value_of(metric).identity, None)
        self._uncertain.discard(role)

    def _remove_strays(self, client: MlflowClient) -> None:
        """Delete empty runs of this execution that were created by requests that timed out."""
        kept = set(self._execution.runs.values())
        for runs in self._find(client).values():
            for run_id in runs.keys() - kept:
                client.delete_run(run_id)


def _batches(items: list[_Item], size: int) -> Iterator[list[_Item]]:
    return (items[start : start + size] for start in range(0, len(items), size))
