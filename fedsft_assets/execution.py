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
from fedsft_assets.federation.journal import EntryError, Missed, Progress, from_line
from fedsft_assets.federation.launch import begin_execution, run_job
from fedsft_assets.federation.metrics import Point
from fedsft_assets.federation.record import Workspace
from fedsft_assets.federation.report import REPORT_FILE, JobReport
from fedsft_assets.federation.tail import Tail
from fedsft_assets.specs import JobSpec, ModelPreset, SitePlan
from fedsft_assets.store import Store, split_file
from fedsft_assets.tracking import Registered, TrackedJob, Tracking

CHART_FILE = "val_loss.png"


@dataclass(frozen=True)
class ExecutedJob:
    """A finished job: its report, the folder of its checkpoint, and where MLflow has it."""

    report: JobReport
    folder: Path
    chart: Path
    registered: Registered


def execute_job(
    job: str,
    store: Store,
    preset: ModelPreset,
    tracking: Tracking,
    tags: dict[str, str],
    say: Callable[[str], object],
    runtime: str = "simulator",
    threads_per_trainer: int = 0,
    environment: dict[str, str] | None = None,
) -> ExecutedJob:
    """Run the job folder of `job`, track it, write its checkpoint and register it.

    `tags` go to the MLflow runs beside the data versions; `say` gets one line of progress at a time.
    A tracking server that does not answer changes nothing but that it gets everything later (see `Outbox`).
    Raises JobError if the job fails; its MLflow runs are then FAILED, or KILLED if it was interrupted.
    """
    folder, into = store.job_folder(job), store.checkpoint(job)
    spec, plans = read_spec(folder), read_plans(folder)
    data = SplitReport.read(store.combined).digest
    params = {"model": preset.name, **_params(spec, plans[0], runtime)}
    workspace = Workspace(store.flare(job))
    earlier = journal_points(workspace.journal)
    execution = begin_execution(folder, workspace.folder, runtime)
    versions = {"data_version.job_folder": execution.subject["job_folder"], "data_version.combined": data}
    with TrackedJob(
        tracking,
        store,
        job,
        execution.id,
        list(spec.sites),
        params,
        {**tags, **versions},
        spec.description,
        say,
        earlier,
        lambda: journal_points(workspace.journal),
    ) as tracked:
        report: JobReport | None = None
        for event in run_job(
            job_folder=folder,
            workspace=workspace.folder,
            testing_file=split_file(store.combined, "testing"),
            into=into,
            runtime=runtime,
            threads=threads_per_trainer,
            environment=environment,
            execution=execution,
        ):
            match event:
                case Progress(text):
                    say(text)
                case Missed(site, number, reason):
                    say(f"round {number} goes on without {site}: {reason}")
                case Point():
                    tracked.log(event)
                case JobReport():
                    report = event
        assert report is not None, "run_job ends with a report or raises"
        chart = into / CHART_FILE
        plot([report], chart)
        artifacts = [into / REPORT_FILE, folder / SPEC_FILE, chart]
        registered = tracked.finish(report, into, artifacts, model=f"fedsft-{preset.name}", data=data)
    workspace.end()
    return ExecutedJob(report, into, chart, registered)


def journal_points(journal: Path) -> list[Point]:
    """The points in the file of a journal, as far as it is written; none if it is not there."""
    points = []
    for line in Tail(journal).new_lines():
        try:
            entry = from_line(line)
        except EntryError:
            continue  # what another version of this package wrote
        if isinstance(entry, Point):
            points.append(entry)
    return points


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
