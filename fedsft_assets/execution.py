"""Running one job with tracking, from its job folder to a registered checkpoint: all that a checkpoint asset does.

Plain Python: a notebook or a test calls it directly.
"""

import json
import logging
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from fedsft_assets.data.split_report import SplitReport
from fedsft_assets.evaluation.curves import plot
from fedsft_assets.federation.job_folder import SPEC_FILE, JobFolder
from fedsft_assets.federation.protocol.job_report import REPORT_FILE, JobReport
from fedsft_assets.federation.protocol.journal import Missed, Progress
from fedsft_assets.federation.supervisor.launch import held_workspace, read_job_folder, run_job
from fedsft_assets.federation.supervisor.privacy import RELEASES_FILE, Releases, ReleasesError
from fedsft_assets.federation.supervisor.workspace import Workspaces
from fedsft_assets.files import link_or_copy
from fedsft_assets.specs.job import JobSpec, PrivacySpec
from fedsft_assets.specs.model_preset import ModelPreset
from fedsft_assets.specs.plan import SitePlan
from fedsft_assets.specs.runtime import SIMULATOR, RuntimeSettings
from fedsft_assets.store import Store, split_file
from fedsft_assets.tracking import Outbox, Registered, TrackedJob, Tracking
from fedsft_assets.tracking.journal_points import JournalPoints
from fedsft_assets.tracking.record import TrackedExecution
from fedsft_assets.tracking.tracked_job import close_as_killed
from fedsft_assets.versions import adding, make_current

CHART_FILE = "val_loss.png"
_INPUTS_FILE = "inputs.json"
_PRIVACY, _DATASET = "filters.privacy.", "site."  # with a field, and a site's name, behind it: parameters in MLflow

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointInputs:
    """What a checkpoint was made of, beside it: versions in the store, as paths relative to the home."""

    job_folder: str
    base_model: str
    validation_file: str

    @classmethod
    def of(cls, job: JobFolder) -> Self:
        plan = job.plans[0]
        return cls(str(job.path.relative_to(job.home)), str(plan.base_model), str(plan.validation_file))

    @classmethod
    def read(cls, checkpoint: Path) -> Self:
        """Of a version of a checkpoint."""
        return cls(**json.loads((checkpoint / _INPUTS_FILE).read_text(encoding="utf-8")))

    def write(self, checkpoint: Path) -> None:
        (checkpoint / _INPUTS_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def combined(self, store: Store) -> Path:
        """The version of the combined splits."""
        return (store.home / self.validation_file).parent


@dataclass(frozen=True)
class ExecutedJob:
    """A finished job: its report, the version of its checkpoint, and where MLflow has it."""

    report: JobReport
    folder: Path
    chart: Path
    registered: Registered


def execute_job(
    job_folder: Path,
    store: Store,
    preset: ModelPreset,
    tracking: Tracking,
    tags: dict[str, str],
    runtime: RuntimeSettings = SIMULATOR,
) -> ExecutedJob:
    """Run a version of a job folder in the store, track it, make its checkpoint the current version and register it.

    `tags` go to the MLflow runs beside the data versions. Progress is logged, a line at a time.
    A tracking server that does not answer changes nothing but that it gets everything later (see `Outbox`).
    Raises JobError if the job fails; its MLflow runs are then FAILED, or KILLED if it was interrupted.
    """
    job = read_job_folder(job_folder)
    spec = job.spec
    inputs = CheckpointInputs.of(job)
    combined = inputs.combined(store)
    data = SplitReport.read(combined).digest
    params = {"model": preset.name, **_params(spec, job.plans[0], runtime.name)}
    with held_workspace(job, store.flare(spec.name), runtime.name) as (workspace, execution):
        close_abandoned(store, spec.name)
        versions = {"data_version.job_folder": job.digest, "data_version.combined": data}
        with TrackedJob(
            tracking,
            store,
            spec.name,
            execution.id,
            list(spec.sites),
            params,
            {**tags, **versions},
            spec.description,
            workspace.tracking_record,
            workspace.journal,
            lambda execution: privacy_spent(store, execution),
        ) as tracked:
            report: JobReport | None = None
            for event in run_job(
                job,
                workspace=workspace.folder,
                testing_file=split_file(combined, "testing"),
                into=workspace.checkpoint,
                runtime=runtime,
                execution=execution,
            ):
                match event:
                    case Progress(text):
                        _log.info("%s · %s", spec.name, text)
                    case Missed(site, number, reason):
                        _log.warning("%s · round %d continues without %s: %s", spec.name, number, site, reason)
                    case JobReport():
                        report = event
            assert report is not None, "run_job ends with a report or raises"
            with adding(store.checkpoint(spec.name)) as addition:
                shutil.copytree(workspace.checkpoint, addition.folder, copy_function=link_or_copy, dirs_exist_ok=True)
                plot([report], addition.folder / CHART_FILE)
                inputs.write(addition.folder)
            folder = addition.version
            artifacts = [folder / REPORT_FILE, job.path / SPEC_FILE, folder / CHART_FILE]
            registered = tracked.finish(report, folder, artifacts, model=f"fedsft-{preset.name}", data=data)
        make_current(folder)
        workspace.end()
    return ExecutedJob(report, folder, folder / CHART_FILE, registered)


def close_abandoned(store: Store, job: str) -> None:
    """End the MLflow runs of executions whose process died before it could, and that nobody has taken up since."""
    for workspace in Workspaces(store.flare(job)).abandoned():
        close_as_killed(
            workspace.tracking_record,
            Outbox(store.outbox),
            JournalPoints(workspace.journal).read(),
            lambda execution: privacy_spent(store, execution),
        )


def privacy_spent(store: Store, execution: TrackedExecution) -> dict[str, float]:
    """What MLflow is to know of the privacy that the sites of an execution have spent by now; nothing without noise.

    That of the site that has spent most: its epsilon, and the releases that it is for. Never raises: what ended the
    execution is what its user must see.
    """
    params = execution.params
    privacy = {
        field: params[f"{_PRIVACY}{field}"] for field in PrivacySpec.model_fields if f"{_PRIVACY}{field}" in params
    }
    if not privacy:
        return {}
    datasets = {site: params[f"{_DATASET}{site}"] for site in execution.sites}
    try:
        spec = PrivacySpec.model_validate(privacy)
        epsilon, releases = Releases(store.home / RELEASES_FILE).most_spent(datasets, spec)
    except (ReleasesError, OSError) as error:
        _log.warning("%s · the privacy that was spent is not in MLflow: %s", execution.job, error)
        return {}
    _log.info(
        "%s · a site has spent epsilon %.4g of its privacy by now, in %d releases", execution.job, epsilon, releases
    )
    return {"epsilon": epsilon, "releases": float(releases)}


def _params(spec: JobSpec, plan: SitePlan, runtime: str) -> dict[str, Any]:
    """What decides the result, and the runtime, each value under a name of its own."""
    own = spec.model_dump(exclude={"name", "description", "sites", "training"})
    said = {**own, **plan.training.model_dump(), "site": {name: site.dataset for name, site in spec.sites.items()}}
    said["peft"] = said["peft"] or {"method": None}
    algorithm = said.pop("algorithm")
    return {
        "kind": spec.kind,
        "runtime": runtime,
        "algorithm": algorithm.pop("name"),
        **_flat({**said, "algorithm": algorithm}),
    }


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
