"""Materializing the full study from a terminal, with progress that a person can follow."""

import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import dagster as dg
import psutil

from fedsft_assets.settings import PROJECT, Settings
from fedsft_assets.specs import JobSpec

_TAG = "fedsft/study"
_POLL_SECONDS = 0.5
# What a person wants to know is printed here; Dagster's own log, with the rest, is in its UI.
_QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


class StudyFailedError(RuntimeError):
    """The Dagster run of the study did not succeed; what failed was said while it ran."""


def prepare_instance(settings: Settings) -> None:
    """Make the Dagster instance of FEDSFT_HOME, with the project's settings, and point this process to it."""
    folder = settings.home / "dagster"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(PROJECT / "dagster.yaml", folder / "dagster.yaml")
    os.environ.update(settings.environment())


def study_job() -> dg.JobDefinition:
    """The asset job `full_study`, as the step processes find it."""
    from fedsft_assets.definitions import defs

    return defs.resolve_job_def("full_study")


def study_run_config(overrides: dict[str, Any], jobs: Sequence[JobSpec], sites: int) -> dict[str, Any]:
    """The Dagster run config that gives every job folder these overrides; those that are None say nothing.

    A centralized job gets `max_local_steps` times the number of sites, so that it trains on as many
    records as all sites together.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    ops: dict[str, Any] = {}
    for job in jobs if given else ():
        config = dict(given)
        if job.kind == "centralized" and "max_local_steps" in config:
            config["max_local_steps"] *= sites
        ops[f"job_folder__{job.name}"] = {"config": config}
    return {"ops": ops}


def run_study(overrides: dict[str, Any]) -> None:
    """Materialize all assets; `overrides` are fields of JobOverrides, set for every job folder.

    Raises StudyFailedError.
    """
    from fedsft_assets.definitions import datasets, jobs

    run_config = {**study_run_config(overrides, jobs, sites=len(datasets)), **_QUIET}
    me = psutil.Process()
    mark = f"{me.pid} {me.create_time()}"
    with dg.DagsterInstance.get() as instance:
        _end_dead_studies(instance)
        try:
            with _progress(instance, mark):
                result = dg.execute_job(
                    dg.reconstructable(study_job), instance=instance, run_config=run_config, tags={_TAG: mark}
                )
        finally:
            for run in instance.get_runs(filters=dg.RunsFilter(tags={_TAG: mark})):
                instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
    if not result.success:
        raise StudyFailedError(f"the study did not succeed; see Dagster run {result.run_id}")


def _end_dead_studies(instance: dg.DagsterInstance) -> None:
    """Cancel Dagster runs of studies whose process was killed, and free the pool slots that they still hold.

    Dagster's daemon does that for runs that it launched; a study from a terminal needs no daemon.
    """
    alive = {f"{process.pid} {process.create_time()}" for process in psutil.process_iter()}
    for run in instance.get_runs(filters=dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])):
        if _TAG in run.tags and run.tags[_TAG] not in alive:
            instance.report_run_canceled(run, message="The process of this study is gone.")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)


@contextmanager
def _progress(instance: dg.DagsterInstance, mark: str) -> Iterator[None]:
    """Print what the tagged Dagster run says, from a thread, until the block ends and all is said."""
    done = threading.Event()
    thread = threading.Thread(target=_print_events, args=(instance, mark, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=10)


def _print_events(instance: dg.DagsterInstance, mark: str, done: threading.Event) -> None:
    begun = time.monotonic()
    cursor: str | None = None
    run_id: str | None = None
    while True:
        last_look = done.is_set()
        if run_id is None:
            runs = instance.get_runs(filters=dg.RunsFilter(tags={_TAG: mark}), limit=1)
            run_id = runs[0].run_id if runs else None
        if run_id is not None:
            connection = instance.get_records_for_run(run_id, cursor=cursor)
            cursor = connection.cursor
            for record in connection.records:
                if text := _line(record.event_log_entry):
                    print(f"{time.monotonic() - begun:5.0f} s  {text}", flush=True)
        if last_look:
            return
        done.wait(_POLL_SECONDS)


def _line(entry: dg.EventLogEntry) -> str | None:
    """What a person wants to know of one entry of Dagster's log, if anything."""
    event = entry.dagster_event
    if event is None:
        return f"   {entry.user_message}" if int(entry.level) >= logging.INFO else None
    if event.event_type == dg.DagsterEventType.STEP_FAILURE:
        error = event.step_failure_data
        said = error.user_failure_data.description if error.user_failure_data else None
        return f"✗  {event.step_key} failed: {said or (error.error.to_string() if error.error else '')}"
    if event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION:
        check = event.asset_check_evaluation_data
        sign = "✗" if check.severity == dg.AssetCheckSeverity.ERROR else "!"
        return None if check.passed else f"{sign}  {check.asset_key.to_user_string()}: {check.description}"
    if event.event_type == dg.DagsterEventType.ASSET_MATERIALIZATION and event.asset_key:
        return f"✓  {event.asset_key.to_user_string()}"
    if event.event_type == dg.DagsterEventType.STEP_START and (event.step_key or "").startswith("checkpoint__"):
        return f"▸  {event.step_key}".replace("__", "/")
    return None
