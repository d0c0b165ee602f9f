"""Materializing assets from a terminal, with progress that a person can follow."""

import logging
import os
import threading
import time
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
_PROCESSES = "fedsft/processes"  # what the study's processes carry
_POLL_SECONDS = 0.5
_SECONDS_TO_END = 30.0
# What a person wants to know is printed here; Dagster's own log, with the rest, is in its UI.
_QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


class StudyFailedError(RuntimeError):
    """The Dagster run of the study did not succeed; what failed was said while it ran."""


def execute(job: Callable[[], dg.JobDefinition], run_config: Mapping[str, Any], settings: Settings) -> str:
    """Execute a Dagster job in this process, each step in one of its own, and print what happens.

    `job` is a function of a module, which step processes call to find the job. Returns the id of the Dagster run.
    Raises StudyFailedError.
    """
    me = psutil.Process()
    mark = f"{me.pid} {me.create_time()}"
    with one_line_when_full(settings.home), dg.DagsterInstance.get() as instance:
        _end_dead_studies(instance)
        os.environ[MARK] = f"{os.environ.get(MARK, '')}/study {mark}"  # so that they are found if this one is killed
        try:
            with _progress(instance, mark, settings):
                result = dg.execute_job(
                    dg.reconstructable(job),
                    instance=instance,
                    run_config={**run_config, **_QUIET},
                    tags={_TAG: mark, _PROCESSES: os.environ[MARK]},
                )
        except Exception:
            _end_steps()
            raise
        finally:
            for run in instance.get_runs(filters=dg.RunsFilter(tags={_TAG: mark})):
                instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)
    if not result.success:
        full = next(filter(None, (_disk_said(event, settings) for event in result.filter_events(_is_failure))), None)
        raise StudyFailedError(full or f"the study did not succeed; see Dagster run {result.run_id}")
    return result.run_id


def versions_in_use(store: Store) -> list[Path]:
    """What Dagster runs that have not finished have made so far."""
    over = (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)
    unfinished = [status for status in dg.DagsterRunStatus if status not in over]
    with dg.DagsterInstance.get() as instance:
        runs = instance.get_runs(filters=dg.RunsFilter(statuses=unfinished))
    return [version for run in runs for version in all_made_by(store, run.run_id)]


def _end_steps() -> None:
    """End the processes of steps, which Dagster leaves running when it fails itself; what they started, they end."""
    steps = [step for server in psutil.Process().children() for step in server.children()]
    for step in steps:
        with suppress(psutil.NoSuchProcess):
            step.terminate()
    psutil.wait_procs(steps, timeout=_SECONDS_TO_END)


def _end_dead_studies(instance: dg.DagsterInstance) -> None:
    """Cancel Dagster runs of studies whose process was killed, and free the pool slots that they still hold.

    Their steps may have lived on; they are ended with what they started. Dagster's daemon does that for runs that it
    launched; a study from a terminal needs no daemon.
    """
    alive = {f"{process.pid} {process.create_time()}" for process in psutil.process_iter()}
    for run in instance.get_runs(filters=dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])):
        if _TAG in run.tags and run.tags[_TAG] not in alive:
            if processes := run.tags.get(_PROCESSES):
                stop_marked(processes, grace=_SECONDS_TO_END)
            instance.report_run_canceled(run, message="The process of this study is gone.")
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)


@contextmanager
def _progress(instance: dg.DagsterInstance, mark: str, settings: Settings) -> Iterator[None]:
    """Print what the tagged Dagster run says, from a thread, until the block ends and all is said."""
    done = threading.Event()
    thread = threading.Thread(target=_print_events, args=(instance, mark, settings, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=10)


def _print_events(instance: dg.DagsterInstance, mark: str, settings: Settings, done: threading.Event) -> None:
    begun = time.monotonic()
    cursor: str | None = None
    run_id: str | None = None
    while True:
        last_look = done.is_set()
        try:
            if run_id is None:
                runs = instance.get_runs(filters=dg.RunsFilter(tags={_TAG: mark}), limit=1)
                run_id = runs[0].run_id if runs else None
            if run_id is not None:
                connection = instance.get_records_for_run(run_id, cursor=cursor)
                cursor = connection.cursor
                for record in connection.records:
                    if text := _line(record.event_log_entry, settings):
                        print(f"{time.monotonic() - begun:5.0f} s  {redact(text)}", flush=True)
        except Exception as error:  # where there is no room on the disk, nothing can be read either
            if not explain(error, settings.home):
                raise
        if last_look:
            return
        done.wait(_POLL_SECONDS)


def _line(entry: dg.EventLogEntry, settings: Settings) -> str | None:
    """What a person wants to know of one entry of Dagster's log, if anything."""
    event = entry.dagster_event
    if event is None:
        sign = "!" if int(entry.level) >= logging.WARNING else " "
        return f"{sign}  {entry.user_message}" if int(entry.level) >= logging.INFO else None
    if _is_failure(event):
        return f"✗  {event.step_key} failed: {_disk_said(event, settings) or _said(event)}"
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


def _said(failure: dg.DagsterEvent) -> str:
    """Why the step failed: the words that were chosen for a person, else the error."""
    error = failure.step_failure_data
    if error.user_failure_data and (said := error.user_failure_data.description):
        return said
    if error.error is None:
        return ""
    refused = error.error.cls_name == "DagsterAssetCheckFailedError"  # each check has had its line
    return error.error.message.strip() if refused else error.error.to_string()


def _disk_said(failure: dg.DagsterEvent, settings: Settings) -> str | None:
    """One line if the step failed because the home's disk has no room; in a federation, it may be another's disk."""
    return explain_text(_said(failure), settings.home) if settings.runtime != "production" else None
