"""`checkpoint/<job>`: the trained archive that a job ends with, and its MLflow run."""

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import dagster as dg

from fedsft_assets.defs.failures import as_dagster_failure
from fedsft_assets.defs.metadata import curve, image, run_tags
from fedsft_assets.defs.resources import MLflowResource, ModelResource, RuntimeResource, StoreResource
from fedsft_assets.execution import CHART_FILE, execute_job, stored_checkpoint
from fedsft_assets.federation.protocol.events import JobError
from fedsft_assets.federation.protocol.job_report import MODEL_FILE, JobReport
from fedsft_assets.federation.supervisor.launch import read_job_folder
from fedsft_assets.specs.job import JobSpec
from fedsft_assets.tracking import Registered

GPU_TAGS = {
    "fedsft/needs": "gpu",
    "dagster-k8s/config": {"container_config": {"resources": {"limits": {"nvidia.com/gpu": "1"}}}},
}

NOT_YET = "(pending: the tracking server does not answer; deliver with `fedsft track`)"

_RUN, _VERSION = "MLflow run", "registered as"
_RUN_PAGE, _MODEL_PAGE = "MLflow run's page", "model's page"


class RuntimeName(Enum):
    simulator = "simulator"
    poc = "poc"
    production = "production"


class LaunchConfig(dg.Config):
    """How a job is run; its content is in its job folder."""

    runtime: RuntimeName | None = None  # None means FEDSFT_RUNTIME
    threads_per_trainer: int = 0  # simulator only; 0 shares the cores among the trainers
    train_again: bool = False  # even if there is a checkpoint of the same inputs


def checkpoint_asset(spec: JobSpec, seeds: dg.PartitionsDefinition | None = None) -> dg.AssetsDefinition:
    @dg.asset(
        key_prefix="checkpoint",
        name=spec.name,
        group_name="checkpoints",
        kinds={"nemo", "nvflare", "mlflow"},
        ins={"job_folder": dg.AssetIn(["job_folder", spec.name])},
        partitions_def=seeds,
        op_tags=GPU_TAGS,
        pool="gpu",
        retry_policy=dg.RetryPolicy(max_retries=2, delay=5),  # for dead processes: JobError.retryable
        description=f"{spec.description}: the best global model of the job, as a NeMo archive.",
    )
    def checkpoint(
        context: dg.AssetExecutionContext,
        config: LaunchConfig,
        store: StoreResource,
        model: ModelResource,
        runtime: RuntimeResource,
        mlflow: MLflowResource,
        job_folder: Path,
    ) -> dg.MaterializeResult[Path]:
        settings = runtime.settings(config.runtime and config.runtime.value, config.threads_per_trainer)
        files = store.of_run(context.run)
        with as_dagster_failure(JobError):
            job = read_job_folder(job_folder)
            if not config.train_again and (stored := stored_checkpoint(job, files, settings.name)):
                context.log.info(f"{spec.name} · already trained from the same inputs; using {stored}")
                return _stored(stored, context.instance.get_latest_materialization_event(context.asset_key))
            executed = execute_job(
                job,
                files,
                model.load(),
                mlflow.tracking,
                tags=run_tags(context),
                runtime=settings,
            )
        return _result(executed.folder, _links(executed.registered))

    return checkpoint


def _links(registered: Registered) -> dict[str, Any]:
    """Where MLflow has the checkpoint."""
    pages = {_RUN_PAGE: registered.run_url, _MODEL_PAGE: registered.version_url}
    return {
        _RUN: registered.run_id or NOT_YET,
        _VERSION: f"{registered.model} version {registered.version or NOT_YET}",
        **{name: dg.MetadataValue.url(url) for name, url in pages.items() if url},
    }


def _stored(version: Path, last: dg.EventLogEntry | None) -> dg.MaterializeResult[Path]:
    """A checkpoint that was not trained again; links are those of the `last` materialization, if it is the same."""
    links = {}
    if last and last.asset_materialization:
        known = last.asset_materialization.metadata
        if known.get("path") == dg.MetadataValue.path(version / MODEL_FILE):
            links = {name: known[name] for name in (_RUN, _VERSION, _RUN_PAGE, _MODEL_PAGE) if name in known}
    return _result(version, {"trained": "in an earlier run, from the same inputs", **links})


def _result(version: Path, more: Mapping[str, Any]) -> dg.MaterializeResult[Path]:
    report = JobReport.read(version)
    return dg.MaterializeResult(
        value=version,
        data_version=dg.DataVersion(report.checkpoint_digest),
        metadata={
            "validation loss": image(version / CHART_FILE),
            "best validation loss": round(report.best_val_loss, 4),
            "test loss": round(report.test_loss, 4),
            "perplexity": round(report.perplexity, 3),
            "tokens trained": report.tokens,
            "seconds": round(report.seconds, 1),
            "runtime": report.runtime,
            "FLARE job": report.job_id,
            "FLARE job status": report.status,
            "history": report.history,
            **({"rounds that sites missed": dg.MetadataValue.json(report.missed)} if report.missed else {}),
            **(
                {"privacy spent (epsilon)": round(report.epsilon, 3), "releases of each site": report.releases}
                if report.epsilon is not None
                else {}
            ),
            "path": dg.MetadataValue.path(version / MODEL_FILE),
            **more,
            "validation loss by round": curve(report.samples, report.val_loss),
        },
    )
