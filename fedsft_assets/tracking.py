"""MLflow: one MLflow run per checkpoint with a child for each site, their curves, and the model registry.

All curves share one axis: MLflow's `step` is the number of records trained on so far, by all sites in the
job's run, by the site in its child.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from fedsft_assets.federation.metrics import Point
from fedsft_assets.federation.phases import PREFIX
from fedsft_assets.federation.report import MODEL_FILE, JobReport

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

EXPERIMENT = "fedsft"
CHAMPION = "champion"
_BATCH = 500  # MLflow takes at most 1,000 metrics in one call


@dataclass(frozen=True)
class Tracking:
    """A tracking server or store, and where its artifacts go if it is a new local store."""

    uri: str
    artifacts: Path | None = None

    def client(self) -> MlflowClient:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.uri)

    def experiment_id(self) -> str:
        """Of the one experiment that all jobs share; made when it is not there."""
        from mlflow.exceptions import MlflowException

        client = self.client()
        location = self.artifacts.as_uri() if self.artifacts else None
        try:
            return str(client.create_experiment(EXPERIMENT, location))
        except MlflowException as error:
            existing = client.get_experiment_by_name(EXPERIMENT)
            if existing is None:
                raise error
            return str(existing.experiment_id)


class TrackedJob:
    """The MLflow runs of one execution of a job: open from construction to `finish` or `end`."""

    def __init__(
        self, tracking: Tracking, job: str, sites: list[str], params: dict[str, Any], tags: dict[str, str], note: str
    ) -> None:
        from mlflow.entities import Param
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE

        self._client = tracking.client()
        experiment = tracking.experiment_id()
        run = self._client.create_run(experiment, run_name=job, tags={**tags, MLFLOW_RUN_NOTE: note})
        self.run_id: str = run.info.run_id
        self._client.log_batch(self.run_id, params=[Param(key, str(value)) for key, value in params.items()])
        self._sites = {
            site: self._client.create_run(
                experiment, run_name=f"{job} {site}", tags={**tags, "site": site, MLFLOW_PARENT_RUN_ID: self.run_id}
            ).info.run_id
            for site in sites
        }
        self._waiting: defaultdict[str, list[Metric]] = defaultdict(list)

    def log(self, point: Point) -> None:
        """Keep a point; points of whole rounds also send all that were kept."""
        if point.site is None:
            self._keep(self.run_id, point.name, point)
            if point.name == "val_loss":
                self._waiting[self.run_id].append(_metric("round", point.round, point.samples))
                self.flush()
        else:
            self._keep(self._sites[point.site], point.name, point)
            if point.step is None and not point.name.startswith(PREFIX):
                self._keep(self.run_id, f"{point.name}.{point.site}", point)

    def _keep(self, run_id: str, name: str, point: Point) -> None:
        self._waiting[run_id].append(_metric(name, point.value, point.samples))

    def flush(self) -> None:
        """Send what is kept. Points stay kept until MLflow has taken them."""
        for run_id, metrics in self._waiting.items():
            while metrics:
                self._client.log_batch(run_id, metrics=metrics[:_BATCH])
                del metrics[:_BATCH]

    def finish(self, report: JobReport, checkpoint: Path, artifacts: list[Path]) -> None:
        """Log the results and end all MLflow runs well. `checkpoint` is the folder of the archive and its report."""
        from mlflow.entities import RunTag

        self.flush()
        results = {
            "test_loss": report.test_loss,
            "perplexity": report.perplexity,
            "best_val_loss": report.best_val_loss,
            "last_val_loss": report.last_val_loss,
            "base_val_loss": report.base_val_loss,
            "tokens_trained": report.tokens,
            "seconds": report.seconds,
            **{f"{PREFIX}{phase}": seconds for phase, seconds in report.phases.items()},
        }
        metrics = [_metric(name, value, 0) for name, value in results.items()]  # at step 0 MLflow draws bars
        tags = {
            "checkpoint.path": str(checkpoint / MODEL_FILE),
            "checkpoint.digest": report.checkpoint_digest,
            "data_version.base_model": report.base_model_digest,
        }
        self._client.log_batch(self.run_id, metrics=metrics, tags=[RunTag(k, v) for k, v in tags.items()])
        self._client.log_dict(self.run_id, tags, "checkpoint.json")
        for artifact in artifacts:
            self._client.log_artifact(self.run_id, str(artifact))
        self.end("FINISHED")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: object, _traceback: object) -> None:
        """A cancelled job is KILLED, a failed one FAILED; `finish` comes before for one that went well."""
        if kind is None:
            return
        try:
            self.flush()
        finally:
            self.end("FAILED" if issubclass(kind, Exception) else "KILLED")

    def end(self, status: str) -> None:
        """End all MLflow runs: FINISHED, FAILED or KILLED."""
        for run_id in [*self._sites.values(), self.run_id]:
            self._client.set_terminated(run_id, status=status)


def register(tracking: Tracking, name: str, run_id: str, report: JobReport, checkpoint: Path, data: str) -> str:
    """Register a checkpoint as a version of the model `name`; returns the version.

    The alias `champion` goes to the version with the lowest test loss among those scored on the same
    `data` (its digest).
    """
    from mlflow.exceptions import MlflowException

    client = tracking.client()
    try:
        client.create_registered_model(name, description="Checkpoints of all jobs that start from one base model.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {"job": report.job, "test_loss": repr(report.test_loss), "data": data, "digest": report.checkpoint_digest}
    version = client.create_model_version(name, source=(checkpoint / MODEL_FILE).as_uri(), run_id=run_id, tags=tags)
    rivals = [v for v in client.search_model_versions(f"name = '{name}'") if v.tags.get("data") == data]
    best = min(rivals, key=lambda v: float(v.tags["test_loss"]))
    client.set_registered_model_alias(name, CHAMPION, best.version)
    return str(version.version)


def _metric(name: str, value: float, samples: int) -> Metric:
    from mlflow.entities import Metric

    return Metric(name, value, int(time.time() * 1000), samples)
