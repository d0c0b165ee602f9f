"""Schedule and sensors of the study.

A weekly schedule and a sensor on the source data, both off by default, re-run the study; another sensor delivers
pending records to MLflow.
"""

import json
import time
from collections.abc import Sequence

import dagster as dg

from fedsft_assets.data.sources.fetch import source_version
from fedsft_assets.defs.assets.raw import SOURCE_VERSION
from fedsft_assets.defs.resources import MLflowResource, SourceResource, StoreResource
from fedsft_assets.defs.study_jobs import FOLLOWED, Job
from fedsft_assets.specs.dataset import COMBINED, DatasetSpec
from fedsft_assets.specs.job import JobSpec
from fedsft_assets.tracking import Outbox

_DELIVERY_SECONDS = 25  # after this, a tick starts no further delivery; Dagster's limit is 60


def weekly_study(first: Job) -> dg.ScheduleDefinition:
    """`first` is the job that a study begins with; other runs follow it where there are several seeds."""
    return dg.ScheduleDefinition(
        name="weekly_study",
        job=first,
        cron_schedule="0 3 * * 0",
        tags={FOLLOWED: "weekly_study"},
        description="The full study, every Sunday at three in the morning.",
    )


def new_data_sensor(datasets: Sequence[DatasetSpec], jobs: Sequence[JobSpec], first: Job) -> dg.SensorDefinition:
    """Compares each dataset's source with the last materialized or requested version, by digest.

    `first` is the job that a study begins with.
    """

    @dg.sensor(
        name="new_data",
        target=first,
        minimum_interval_seconds=60,
        description="Rebuilds only what is downstream of a dataset whose source is new or has changed. Jobs that"
        " do not train on it are evaluated again, not trained again.",
    )
    def new_data(context: dg.SensorEvaluationContext, source: SourceResource) -> dg.SensorResult | dg.SkipReason:
        requested: dict[str, str] = json.loads(context.cursor or "{}")
        now = {dataset.name: source_version(dataset, source.place) for dataset in datasets}
        changed = [
            name for name, version in now.items() if version not in (requested.get(name), _materialized(context, name))
        ]
        if not changed:
            return dg.SkipReason("no source has changed since it was last read")
        request = dg.RunRequest(
            asset_selection=_stale_and_missing(context, changed, jobs, first.selection),
            tags={"fedsft/changed": ",".join(changed), FOLLOWED: "new_data"},
        )
        return dg.SensorResult(run_requests=[request], cursor=json.dumps(now))

    return new_data


@dg.sensor(
    name="undelivered_tracking",
    minimum_interval_seconds=60,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Delivers pending records to MLflow. Only checks a folder if there are none.",
)
def undelivered_tracking(store: StoreResource, mlflow: MLflowResource) -> dg.SkipReason:
    outbox, begun = Outbox(store.files.outbox), time.monotonic()
    if outbox.is_empty:
        return dg.SkipReason("no pending MLflow records")
    remaining = outbox.deliver(mlflow.tracking, stop=lambda: time.monotonic() - begun > _DELIVERY_SECONDS)
    return dg.SkipReason(
        "\n".join(f"{entry.job}: not delivered: {entry.reason}" for entry in remaining) or "all delivered"
    )


def _stale_and_missing(
    context: dg.SensorEvaluationContext, changed: Sequence[str], jobs: Sequence[JobSpec], among: dg.AssetSelection
) -> list[dg.AssetKey]:
    """Everything downstream of the changed datasets, and its inputs that were never materialized, as far as in `among`.

    Left out are checkpoints of jobs that train on none of them: only their validation split has changed.
    """
    assert context.repository_def is not None
    graph = context.repository_def.asset_graph
    kept = {dg.AssetKey(["checkpoint", job.name]) for job in jobs if not {*changed, COMBINED} & {*job.datasets}}
    stale: set[dg.AssetKey] = set()
    waiting = [dg.AssetKey(["raw", name]) for name in changed]
    while waiting:
        key = waiting.pop()
        if key not in stale and key not in kept:
            stale.add(key)
            waiting += graph.get(key).child_keys
    needed = dg.AssetSelection.assets(*stale).upstream().resolve(graph) - stale
    missing = {key for key in needed if context.instance.get_latest_materialization_event(key) is None}
    return sorted((stale | missing) & among.resolve(graph))


def _materialized(context: dg.SensorEvaluationContext, dataset: str) -> str | None:
    """The `source_version` of the last materialization."""
    event = context.instance.get_latest_materialization_event(dg.AssetKey(["raw", dataset]))
    version = (
        event.asset_materialization.metadata.get(SOURCE_VERSION) if event and event.asset_materialization else None
    )
    return str(version.value) if version else None
