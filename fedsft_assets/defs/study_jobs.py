"""The jobs of a study.

Over one seed it is one job, `full_study`. Over several, each seed is a partition of `train`; what has no seed is made
by `prepare_data` before and by `compare` after, so that a seed's run does not repeat it. A run of `prepare_data` that a
schedule or sensor has requested is followed by the others, through a sensor.
"""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from fedsft_assets.defs.seeds import of_study, partition_of
from fedsft_assets.specs.job import BASE_MODEL

FOLLOWED = "fedsft/followed"
"""Run tag, of a run that the other runs of the study follow."""

REPORTS = dg.AssetSelection.groups("comparison")
_BASE_MODEL = dg.AssetSelection.assets("base_model", ["evaluation", BASE_MODEL])

FULL_STUDY, PREPARE_DATA, TRAIN, COMPARE = "full_study", "prepare_data", "train", "compare"

Job = Any  # Dagster does not export the type of an unresolved asset job


def study_jobs(seeds: dg.PartitionsDefinition | None, base_seeds: dg.PartitionsDefinition | None) -> list[Job]:
    """One job, or three in their order; `base_seeds` are partitions of a base model with random weights."""
    if seeds is None:
        everything = "Everything from raw data to the comparison, for all jobs."
        return [dg.define_asset_job(FULL_STUDY, dg.AssetSelection.all(), description=everything)]
    seeded: dg.AssetSelection = dg.AssetSelection.groups("job_folders", "checkpoints", "evaluations")
    seeded = seeded | _BASE_MODEL if base_seeds else seeded - _BASE_MODEL
    data = dg.AssetSelection.all() - seeded - REPORTS
    return [
        dg.define_asset_job(PREPARE_DATA, data, description="Raw data, splits, and a pretrained base model."),
        dg.define_asset_job(TRAIN, seeded, description="Trains and evaluates all jobs with one seed."),
        dg.define_asset_job(COMPARE, REPORTS, description="The comparison over all seeds, and the answers."),
    ]


def study_sensors(seeds: dg.PartitionsDefinition | None, jobs: list[Job]) -> list[dg.SensorDefinition]:
    """The sensor that requests the following runs of a study over several seeds."""
    if seeds is None:
        return []
    prepare, train, compare = jobs

    @dg.run_status_sensor(
        run_status=dg.DagsterRunStatus.SUCCESS,
        monitored_jobs=[prepare, train],
        request_jobs=[train, compare],
        minimum_interval_seconds=30,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="After the data of a scheduled study, requests a run for each seed, and then the comparison.",
    )
    def following_runs(context: dg.RunStatusSensorContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
        run, every = context.dagster_run, seeds.get_partition_keys()
        if FOLLOWED not in run.tags:
            yield dg.SkipReason("this run was launched by hand, so that nothing follows it")
        elif run.job_name == PREPARE_DATA:
            tags = {FOLLOWED: run.run_id, **of_study([run.run_id])}
            for seed in every:
                yield dg.RunRequest(f"{run.run_id} {seed}", job_name=TRAIN, partition_key=seed, tags=tags)
        else:
            first = run.tags[FOLLOWED]
            done = _successful(context.instance, first)
            if missing := [seed for seed in every if seed not in done]:
                yield dg.SkipReason(f"the comparison waits for seed {', '.join(missing)}")
            else:
                tags = of_study([first, *(done[seed] for seed in every)])
                yield dg.RunRequest(f"{first} comparison", job_name=COMPARE, tags=tags)

    return [following_runs]


def _successful(instance: dg.DagsterInstance, first: str) -> dict[str, str]:
    """The last successful run of each seed, by partition, that has followed the run `first`."""
    found = dg.RunsFilter(job_name=TRAIN, statuses=[dg.DagsterRunStatus.SUCCESS], tags={FOLLOWED: first})
    return {partition_of(run.tags) or "": run.run_id for run in reversed(instance.get_runs(found))}
