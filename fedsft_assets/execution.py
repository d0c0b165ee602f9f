"""Running one job with tracking, from its job folder to a registered checkpoint: all that a checkpoint asset does.

Plain Python: a notebook or a test calls it directly.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsft_assets.data.report import SplitReport
from fedsft_assets.evaluation.comparison import plot
from fedsft_assets.federation.job_folder import SPEC_FILE, read_plans, read_spec
from fedsft_assets.federation.launch import run_job
from fedsft_assets.federation.metrics import Point
from fedsft_assets.federation.report import REPORT_FILE, JobReport
from fedsft_assets.federation.trainer_log import Progress
from fedsft_assets.specs import JobSpec, ModelPreset, SitePlan
from fedsft_assets.store import Store, folder_digest, split_file
from fedsft_assets.tracking import TrackedJob, Tracking, register

CHART_FILE = "val_loss.png"


@dataclass(frozen=True)
class ExecutedJob:
    """A finished job: its report, the folder of its checkpoint, and where MLflow has it."""

    report: JobReport
    folder: Path
    chart: Path
    mlflow_run_id: str
    registered_model: str
    registered_version: str


def execute_job(
    job: str,
    store: Store,
    preset: ModelPreset,
    tracking: Tracking,
    tags: dict[str, str],
    say: Callable[[str], object],
    threads_per_trainer: int = 0,
    environment: dict[str, str] | None = None,
) -> ExecutedJob:
    """Run the job folder of `job`, track it, write its checkpoint and register it.

    `tags` go to the MLflow runs beside the data versions; `say` gets one line of progress at a time.
    Raises JobError if the job fails; its MLflow runs are then FAILED, or KILLED if it was interrupted.
    """
    folder, into = store.job_folder(job), store.checkpoint(job)
    spec, plans = read_spec(folder), read_plans(folder)
    data = SplitReport.read(store.combined).digest
    versions = {"data_version.job_folder": folder_digest(folder), "data_version.combined": data}
    params = {"model": preset.name, **_params(spec, plans[0])}
    with TrackedJob(tracking, job, list(spec.sites), params, {**tags, **versions}, note=spec.description) as tracked:
        report: JobReport | None = None
        for event in run_job(
            job_folder=folder,
            workspace=store.flare(job),
            testing_file=split_file(store.combined, "testing"),
            into=into,
            threads=threads_per_trainer,
            environment=environment,
        ):
            match event:
                case Progress(text):
                    say(text)
                case Point():
                    tracked.log(event)
                case JobReport():
                    report = event
        assert report is not None, "run_job ends with a report or raises"
        chart = into / CHART_FILE
        plot([report], chart)
        tracked.finish(report, into, artifacts=[into / REPORT_FILE, folder / SPEC_FILE, chart])
    name = f"fedsft-{preset.name}"
    version = register(tracking, name, tracked.run_id, report, into, data)
    return ExecutedJob(report, into, chart, tracked.run_id, name, version)


def _params(spec: JobSpec, plan: SitePlan) -> dict[str, Any]:
    own = spec.model_dump(exclude={"name", "description", "sites", "training"})
    sites = {f"site.{name}": site.dataset for name, site in spec.sites.items()}
    training = plan.training.model_dump()
    peft = training.pop("peft") or {"method": None}
    return {"kind": spec.kind, **own, **sites, **training, **{f"peft.{key}": value for key, value in peft.items()}}
