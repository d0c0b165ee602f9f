"""Runs one job with tracking, from its job folder to a registered checkpoint: the work of a checkpoint asset.

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
from fedsft_assets.federation.protocol.events import JobError
from fedsft_assets.federation.protocol.job_report import REPORT_FILE, JobReport
from fedsft_assets.federation.protocol.journal import Missed, Progress
from fedsft_assets.federation.supervisor.launch import held_workspace, read_job_folder, run_job, subject_of
from fedsft_assets.federation.supervisor.privacy import RELEASES_FILE, Releases, ReleasesError
from fedsft_assets.federation.supervisor.workspace import Workspaces
from fedsft_assets.files import folder_digest, link_or_copy
from fedsft_assets.specs.dataset import COMBINED
from fedsft_assets.specs.job import JobSpec, PrivacySpec
from fedsft_assets.specs.model_preset import ModelPreset
from fedsft_assets.specs.plan import SitePlan
from fedsft_assets.specs.runtime import SIMULATOR, RuntimeSettings
from fedsft_assets.store import Store, split_file
from fedsft_assets.tracking import Outbox, Registered, TrackedJob, Tracking, registered_model
from fedsft_assets.tracking.datasets import Context, UsedSplit
from fedsft_assets.tracking.journal_points import JournalPoints
from fedsft_assets.tracking.record import TrackedExecution
from fedsft_assets.tracking.tracked_job import close_as_killed
from fedsft_assets.versions import adding, make_current, versions_of

CHART_FILE = "val_loss.png"
_INPUTS_FILE = "inputs.json"
_PRIVACY, _DATASET = "filters.privacy.", "site."  # prefixes of MLflow parameters, followed by a field or a site's name

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointInputs:
    """The inputs of a checkpoint, stored beside it: versions in the store, as paths relative to the home."""

    job_folder: str
    base_model: str
    validation_file: str

    @classmethod
    def of(cls, job: JobFolder) -> Self:
        plan = job.plans[0]
        return cls(str(job.path.relative_to(job.home)), str(plan.base_model), str(plan.validation_file))

    @classmethod
    def read(cls, checkpoint: Path) -> Self:
        """Read the inputs of a version of a checkpoint."""
        return cls(**json.loads((checkpoint / _INPUTS_FILE).read_text(encoding="utf-8")))

    def write(self, checkpoint: Path) -> None:
        (checkpoint / _INPUTS_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    def combined(self, store: Store) -> Path:
        """The version of the combined splits."""
        return (store.home / self.validation_file).parent


@dataclass(frozen=True)
class ExecutedJob:
    """A finished job: its report, checkpoint version, and MLflow registration."""

    report: JobReport
    folder: Path
    registered: Registered


def stored_checkpoint(job: JobFolder, store: Store, runtime: str) -> Path | None:
    """The newest finished version of the checkpoint that was trained in this runtime from equal inputs, or None.

    Equal is the data version of the job folder: with another validation split alone, the checkpoint stays. A job with
    private sites has none, as their data may have changed. A version with modified files is left out, with a warning.
    """
    if job.spec.private_sites:
        return None
    workspaces = Workspaces(store.flare(job.spec.name))
    for version in versions_of(store.checkpoint(job.spec.name)):
        try:
            made_from = read_job_folder(store.home / CheckpointInputs.read(version).job_folder)
            made_in = JobReport.read(version).runtime
        except (JobError, OSError, ValueError, TypeError):  # incomplete, or of an earlier version of this package
            continue
        if (
            made_in != runtime
            or made_from.data_version != job.data_version
            or workspaces.has_unfinished(subject_of(made_from, runtime))
        ):
            continue
        if folder_digest(version) == version.name:
            return version
        _log.warning("%s was modified since it was written; training again", version)
    return None


def execute_job(
    job: JobFolder | Path,
    store: Store,
    preset: ModelPreset,
    tracking: Tracking,
    tags: dict[str, str],
    runtime: RuntimeSettings = SIMULATOR,
) -> ExecutedJob:
    """Run a version of a job folder, or the one at a path, track it, register its checkpoint and make it current.

    `tags` are added to the MLflow runs, besides the data versions. Progress is logged. If the tracking server does not
    answer, everything is delivered later (see `Outbox`). Raises JobError if the job fails; its MLflow runs are then
    FAILED, or KILLED if it was interrupted.
    """
    job = job if isinstance(job, JobFolder) else read_job_folder(job)
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
            used_splits(job, combined, data),
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
            registered = tracked.finish(report, folder, artifacts, model=registered_model(preset.name), data=data)
        make_current(folder)
        workspace.end()
    return ExecutedJob(report, folder, registered)


def used_splits(job: JobFolder, combined: Path, data: str) -> list[UsedSplit]:
    """What the sites train on, each dataset once, and the combined splits, with the digest `data`."""
    own = {
        job.spec.sites[plan.site].dataset: UsedSplit(
            job.spec.sites[plan.site].dataset,
            "training",
            plan.training_file.parent.name if plan.training_file.parent.name != combined.name else data,
            str(plan.training_file),
        )
        for plan in job.located_plans
    }
    contexts: tuple[Context, ...] = ("validation", "testing")
    shared = [UsedSplit(COMBINED, context, data, str(split_file(combined, context))) for context in contexts]
    return [*own.values(), *shared]


def close_abandoned(store: Store, job: str) -> None:
    """End the MLflow runs of abandoned executions, whose process died without ending them."""
    for workspace in Workspaces(store.flare(job)).abandoned():
        close_as_killed(
            workspace.tracking_record,
            Outbox(store.outbox),
            JournalPoints(workspace.journal).read(),
            lambda execution: privacy_spent(store, execution),
        )


def privacy_spent(store: Store, execution: TrackedExecution) -> dict[str, float]:
    """MLflow metrics of the privacy that an execution's sites have spent so far; empty without noise.

    Values of the site that has spent most: epsilon and number of releases. Never raises: the user must see the error
    that ended the execution.
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
        _log.warning("%s · the privacy spent is missing in MLflow: %s", execution.job, error)
        return {}
    _log.info("%s · privacy spent so far: epsilon %.4g in %d releases", execution.job, epsilon, releases)
    return {"epsilon": epsilon, "releases": float(releases)}


def _params(spec: JobSpec, plan: SitePlan, runtime: str) -> dict[str, Any]:
    """MLflow parameters: everything that determines the result, and the runtime, flattened."""
    own = spec.model_dump(exclude={"name", "description", "sites", "training"})
    values = {**own, **plan.training.model_dump(), "site": {name: site.dataset for name, site in spec.sites.items()}}
    values["peft"] = values["peft"] or {"method": None}
    algorithm = values.pop("algorithm")
    return {
        "kind": spec.kind,
        "runtime": runtime,
        "algorithm": algorithm.pop("name"),
        **_flat({**values, "algorithm": algorithm}),
    }


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
