"""`checkpoint/<job>`: the trained archive that a job ends with, and its MLflow run."""

from enum import Enum
from pathlib import Path

import dagster as dg

from fedsft_assets.defs.failures import as_dagster_failure
from fedsft_assets.defs.metadata import curve, image
from fedsft_assets.defs.resources import MLflowResource, ModelResource, RuntimeResource, StoreResource
from fedsft_assets.execution import ExecutedJob, execute_job
from fedsft_assets.federation.protocol.events import JobError
from fedsft_assets.federation.protocol.job_report import MODEL_FILE
from fedsft_assets.specs.job import JobSpec

GPU_TAGS = {
    "fedsft/needs": "gpu",
    "dagster-k8s/config": {"container_config": {"resources": {"limits": {"nvidia.com/gpu": "1"}}}},
}

NOT_YET = "(pending: the tracking server does not answer; deliver with `fedsft track`)"


class RuntimeName(Enum):
    simulator = "simulator"
    poc = "poc"
    production = "production"


class LaunchConfig(dg.Config):
    """How a job is run; its content is in its job folder."""

    runtime: RuntimeName | None = None  # None means FEDSFT_RUNTIME
    threads_per_trainer: int = 0  # simulator only; 0 shares the cores among the trainers


def checkpoint_asset(spec: JobSpec) -> dg.AssetsDefinition:
    @dg.asset(
        key_prefix="checkpoint",
        name=spec.name,
        group_name="checkpoints",
        kinds={"nemo", "nvflare", "mlflow"},
        ins={"job_folder": dg.AssetIn(["job_folder", spec.name])},
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
        with as_dagster_failure(JobError):
            executed = execute_job(
                job_folder,
                store.files,
                model.load(),
                mlflow.tracking,
                tags={"dagster.run_id": context.run_id, "dagster.asset": context.asset_key.to_user_string()},
                runtime=runtime.settings(config.runtime and config.runtime.value, config.threads_per_trainer),
            )
        return _result(executed)

    return checkpoint


def _result(executed: ExecutedJob) -> dg.MaterializeResult[Path]:
    report, registered = executed.report, executed.registered
    return dg.MaterializeResult(
        value=executed.folder,
        data_version=dg.DataVersion(report.checkpoint_digest),
        metadata={
            "validation loss": image(executed.chart),
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
            "path": dg.MetadataValue.path(executed.folder / MODEL_FILE),
            "MLflow run": registered.run_id or NOT_YET,
            "registered as": f"{registered.model} version {registered.version or NOT_YET}",
            **({"MLflow run's page": dg.MetadataValue.url(registered.run_url)} if registered.run_url else {}),
            **({"model's page": dg.MetadataValue.url(registered.version_url)} if registered.version_url else {}),
            "validation loss by round": curve(report.samples, report.val_loss),
        },
    )
