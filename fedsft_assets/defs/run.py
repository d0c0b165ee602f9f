"""Materializes assets from a terminal, with readable progress."""

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dagster as dg
import psutil

from fedsft_assets.credentials import redact
from fedsft_assets.defs.resources import all_made_by
from fedsft_assets.disk import explain, explain_text, one_line_when_full
from fedsft_assets.federation.runtimes.processes import MARK, stop_marked
from fedsft_assets.settings import Settings
from fedsft_assets.store import Store

_TAG = "fedsft/study"
_RUN = "fedsft/study_run"  # this run among those of one process
_PROCESSES = "fedsft/processes"  # process mark of the study
_POLL_SECONDS = 0.5
_SECONDS_TO_END = 30.0
# Progress is printed here; Dagster's full log is in its UI.
_QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


class StudyFailedError(RuntimeError):
    """The Dagster run of the study failed; the failures were printed while it ran."""


def execute(
    job: Callable[[], dg.JobDefinition],
    run_config: Mapping[str, Any],
    settings: Settings,
    tags: Mapping[str, str] | None = None,
) -> str:
    """Execute a Dagster job in this process, with one process per step, and print its progress.

    `job` is a module-level function that step processes call to reconstruct the job, `tags` are further ones of the
    run. Returns the id of the Dagster run.
    Raises StudyFailedError.
    """
    me = psutil.Process()
    mark = f"{me.pid} {me.create_time()}"
    with one_line_when_full(settings.home), dg.DagsterInstance.get() as instance:
        _end_dead_studies(instance)
        own = f"/study {mark}"  # to find child processes if this one is killed
        os.environ[MARK] = f"{os.environ.get(MARK, '').removesuffix(own)}{own}"
        this = {_TAG: mark, _RUN: uuid.uuid4().hex}
        try:
            with _progress(instance, this, settings):
                result = dg.execute_job(
                    dg.reconstructable(job),
                    instance=instance,
                    run_config={**run_config, **_QUIET},
                    tags={**(tags or {}), **this, _PROCESSES: os.environ[MARK]},
                )
        except Exception:
            _end_steps()
            raise
        finally:
            for run in instance.get_runs(filters=dg.RunsFilter(tags=this)):
                instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
    if not result.success:
        full = next(filter(None, (_disk_full(event, settings) for event in result.filter_events(_is_failure))), None)
        raise StudyFailedError(full or f"the study failed; see Dagster run {result.run_id}")
    return result.run_id


def versions_in_use(store: Store) -> list[Path]:
    """Versions made so far by unfinished Dagster runs."""
    finished = (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)
    unfinished = [status for status in dg.DagsterRunStatus if status not in finished]
    with dg.DagsterInstance.get() as instance:
        runs = instance.get_runs(filters=dg.RunsFilter(statuses=unfinished))
    return [version for run in runs for version in all_made_by(store, run.run_id)]


def _end_steps() -> None:
    """End step processes, which Dagster leaves running when it fails itself; they end their own children."""
    steps = [step for server in psutil.Process().children() for step in server.children()]
    for step in steps:
        with suppress(psutil.NoSuchProcess):
            step.terminate()
    psutil.wait_procs(steps, timeout=_SECONDS_TO_END)


def _end_dead_studies(instance: dg.DagsterInstance) -> None:
    """Cancel Dagster runs of studies whose process was killed, and free their pool slots.

    Their steps may still be running and are ended with their children. Dagster's daemon does this for runs that it
    launched, but a study from a terminal needs no daemon.
    """
    alive = {f"{process.pid} {process.create_time()}" for process in psutil.process_iter()}
    for run in instance.get_runs(filters=dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])):
        if _TAG in run.tags and run.tags[_TAG] not in alive:
            if processes := run.tags.get(_PROCESSES):
                stop_marked(processes, grace=_SECONDS_TO_END)
            instance.report_run_canceled(run, message="The process of this study is gone.")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)


@contextmanager
def _progress(instance: dg.DagsterInstance, tags: Mapping[str, str], settings: Settings) -> Iterator[None]:
    """Print the events of the tagged Dagster run, from a thread, until the block ends and all are printed."""
    done = threading.Event()
    thread = threading.Thread(target=_print_events, args=(instance, tags, settings, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=10)


def _print_events(
    instance: dg.DagsterInstance, tags: Mapping[str, str], settings: Settings, done: threading.Event
) -> None:
    begun = time.monotonic()
    cursor: str | None = None
    run_id: str | None = None
    while True:
        last_poll = done.is_set()
        try:
            if run_id is None:
                runs = instance.get_runs(filters=dg.RunsFilter(tags=dict(tags)), limit=1)
                run_id = runs[0].run_id if runs else None
            if run_id is not None:
                connection = instance.get_records_for_run(run_id, cursor=cursor)
                cursor = connection.cursor
                for record in connection.records:
                    if text := log_line(record.event_log_entry, settings):
                        print(f"{time.monotonic() - begun:5.0f} s  {redact(text)}", flush=True)
        except Exception as error:  # on a full disk, events cannot be read either
            if not explain(error, settings.home):
                raise
        if last_poll:
            return
        done.wait(_POLL_SECONDS)


def log_line(entry: dg.EventLogEntry, settings: Settings) -> str | None:
    """The line to print for an entry of Dagster's log, or None."""
    event = entry.dagster_event
    if event is None:
        sign = "!" if int(entry.level) >= logging.WARNING else " "
        return f"{sign}  {entry.user_message}" if int(entry.level) >= logging.INFO else None
    if _is_failure(event):
        return f"✗  {event.step_key} failed: {_disk_full(event, settings) or _reason(event)}"
    if event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION:
        check = event.asset_check_evaluation_data
        sign = "✗" if check.severity == dg.AssetCheckSeverity.ERROR else "!"
        return None if check.passed else f"{sign}  {check.asset_key.to_user_string()}: {check.description}"
    if event.event_type == dg.DagsterEventType.ASSET_MATERIALIZATION and event.asset_key:
        return f"✓  {event.asset_key.to_user_string()}"
    if event.event_type == dg.DagsterEventType.STEP_START and (event.step_key or "").startswith("checkpoint__"):
        return f"▸  {event.step_key}".replace("__", "/")
    return None


def _is_failure(event: dg.DagsterEvent) -> bool:
    return event.event_type == dg.DagsterEventType.STEP_FAILURE


def _reason(failure: dg.DagsterEvent) -> str:
    """Why the step failed: the description for the user, otherwise the error."""
    error = failure.step_failure_data
    if error.user_failure_data and (description := error.user_failure_data.description):
        return description
    if error.error is None:
        return ""
    is_check = error.error.cls_name == "DagsterAssetCheckFailedError"  # each check has been printed
    return error.error.message.strip() if is_check else error.error.to_string()


def _disk_full(failure: dg.DagsterEvent, settings: Settings) -> str | None:
    """An explanation if the step failed because the home's disk is full; in a federation, it may be another disk."""
    return explain_text(_reason(failure), settings.home) if settings.runtime != "production" else None
