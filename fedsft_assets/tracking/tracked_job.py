"""Tracks a job while it runs, without ever blocking it."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from fedsft_assets.federation.protocol.costs import CPU_SECONDS, PEAK_MEMORY, RECEIVED, SENT
from fedsft_assets.federation.protocol.job_report import MODEL_FILE, JobReport
from fedsft_assets.federation.protocol.phases import metric_name
from fedsft_assets.federation.protocol.points import Point
from fedsft_assets.store import Store
from fedsft_assets.tracking.datasets import UsedSplit
from fedsft_assets.tracking.delivery import Delivery
from fedsft_assets.tracking.journal_points import JournalPoints
from fedsft_assets.tracking.mlflow_store import ANSWER_SECONDS, Tracking, limit_requests, timed_out
from fedsft_assets.tracking.mlflow_values import JOB
from fedsft_assets.tracking.outbox import BusyError, Entry, Outbox, explained, is_refusal
from fedsft_assets.tracking.record import Ending, Registration, Status, TrackedExecution
from fedsft_assets.tracking.tensorboard import EventThread

_TICK_SECONDS = 1.0  # between reads of the journal; new points are sent in one batch
_FIRST_PAUSE, _LONGEST_PAUSE, _LONGEST_PAUSE_AT_END = 1.0, 30.0, 5.0  # seconds before a retry
_LONGEST_ANSWER = 120
_ENDED_PATIENCE = 10.0  # for a job that failed or was cancelled

Spent = Callable[[TrackedExecution], dict[str, float]]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Registered:
    """The registered model, version and MLflow run of a finished job.

    `version` and `run_id` are None until the tracking server has answered, and the addresses of their pages also if
    MLflow is no server.
    """

    model: str
    version: str | None
    run_id: str | None
    run_url: str | None = None
    version_url: str | None = None


class TrackedJob:
    """Tracks one execution of a job in MLflow and TensorBoard, until `finish` or the end of the `with` block.

    Points come from the file `journal`, to which another process appends. Only the end waits for the tracking server,
    for at most `tracking.patience` seconds; what is undelivered by then stays in the store's outbox. `record` is the
    file of the last execution in the same workspace. If it has the same `execution_id`, this is another attempt and its
    MLflow runs are resumed. If it has a different one whose process died without ending it, that one is closed as
    KILLED. `spent` returns the cost of an unsuccessful execution as metrics by name. `splits` are MLflow's datasets.
    """

    def __init__(
        self,
        tracking: Tracking,
        store: Store,
        job: str,
        execution_id: str,
        sites: list[str],
        params: dict[str, Any],
        tags: dict[str, str],
        note: str,
        record: Path,
        journal: Path,
        spent: Spent = lambda _: {},
        splits: Sequence[UsedSplit] = (),
    ) -> None:
        self._tracking = tracking
        self._spent = spent
        self._outbox = Outbox(store.outbox)
        self._record = record
        self._record_lock = threading.Lock()
        self._points = JournalPoints(journal)
        last = _read(self._record)
        if last and last.id == execution_id:  # MLflow parameters are immutable
            self._execution = replace(last, tags={**last.tags, **tags}, ended=False)
        else:
            close_as_killed(self._record, self._outbox, spent=spent)
            values = {name: str(value) for name, value in params.items()}
            begun = round(time.time(), 3)
            self._execution = TrackedExecution(execution_id, job, sites, values, tags, note, begun, splits=list(splits))
        self._execution.write(self._record)  # before anything is created under its id
        delivery = Delivery(tracking, self._execution, self._save)
        self._events = EventThread(store.tensorboard(job), self._points)
        self._delivery = _DeliveryThread(tracking, self._outbox, self._execution, delivery, self._points)
        self._events.start()
        self._delivery.start()

    @property
    def run_id(self) -> str | None:
        """Id of the job's MLflow run; None until it is created."""
        return self._execution.runs.get(JOB)

    def finish(self, report: JobReport, checkpoint: Path, artifacts: list[Path], model: str, data: str) -> Registered:
        """Deliver everything and end the MLflow runs as FINISHED.

        `checkpoint` is the folder of the archive and its report, to be registered as a version of `model`, which was
        scored on the combined splits with the digest `data`. Raises OSError if the outbox cannot be written.
        """
        archive = checkpoint / MODEL_FILE
        results = {
            "test_loss": report.test_loss,
            "perplexity": report.perplexity,
            "best_val_loss": report.best_val_loss,
            "last_val_loss": report.last_val_loss,
            "base_val_loss": report.base_val_loss,
            "tokens_trained": float(report.tokens),
            "seconds": report.seconds,
            **{metric_name(phase): seconds for phase, seconds in report.phases.items()},
        }
        costs = {
            "steps": report.steps,
            SENT: report.sent,
            RECEIVED: report.received,
            CPU_SECONDS: report.cpu_seconds,
            PEAK_MEMORY: report.peak_memory,
        }
        results |= {name: float(value) for name, value in costs.items() if value is not None}
        if report.epsilon is not None and report.releases is not None:
            results |= {"epsilon": report.epsilon, "releases": float(report.releases)}
        tags = {
            "checkpoint.path": str(archive),
            "checkpoint.digest": report.checkpoint_digest,
            "data_version.base_model": report.base_model_digest,
        }
        registration = Registration(model, str(archive), report.checkpoint_digest, report.test_loss, data)
        ending = Ending("FINISHED", round(time.time(), 3), results, tags, registration)
        entry = self._put(ending, artifacts, {"checkpoint.json": json.dumps(tags)})
        with self._record_lock:
            self._record.unlink(missing_ok=True)
        self._deliver(entry, self._tracking.patience)
        version, run_id, pages = self._delivery.version, self.run_id, self._tracking.pages
        experiment = self._delivery.experiment if pages else ""
        return Registered(
            model,
            version,
            run_id,
            f"{pages}/experiments/{experiment}/runs/{run_id}" if experiment and run_id else None,
            f"{pages}/models/{model}/versions/{version}" if experiment and version else None,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: object, _traceback: object) -> None:
        """End a cancelled job as KILLED and a failed one as FAILED, unless `finish` was called."""
        if kind is None or self._delivery.ending:
            return
        status: Status = "FAILED" if issubclass(kind, Exception) else "KILLED"
        try:
            entry = self._put(Ending(status, round(time.time(), 3), self._spent(self._execution)))
            self._execution.ended = True
            self._save(self._execution)
            self._deliver(entry, min(_ENDED_PATIENCE, self._tracking.patience))
        except OSError as error:  # the user must see the error that ended the job
            _log.error("%s · tracking: %s", self._execution.job, explained(error))

    def _save(self, execution: TrackedExecution) -> None:
        with self._record_lock:
            if self._record.is_file():  # otherwise finished: the rest is in the outbox
                execution.write(self._record)

    def _put(self, ending: Ending, artifacts: Sequence[Path] = (), texts: dict[str, str] | None = None) -> Entry:
        """Store everything that belongs to the execution in the outbox, before trying to deliver it."""
        points = self._points.read()
        self._events.complete()
        return self._outbox.put(self._execution, points, ending, artifacts, texts)

    def _deliver(self, entry: Entry, patience: float) -> None:
        if not self._delivery.deliver(entry, patience):
            _log.warning(
                "%s · not everything was delivered to the tracking server (%s); the rest is kept in %s and delivered by"
                " `fedsft track` or with the next job",
                self._execution.job,
                self._delivery.trouble,
                entry.folder,
            )


def close_as_killed(record: Path, outbox: Outbox, points: Sequence[Point] = (), spent: Spent = lambda _: {}) -> None:
    """End the MLflow runs of an execution whose process died without ending them.

    `points` may be unsent. `spent` is that of TrackedJob.
    """
    last = _read(record)
    if last and not last.ended and not outbox.get(last.id):
        outbox.put(last, points, Ending("KILLED", round(time.time(), 3), spent(last)))
        replace(last, ended=True).write(record)


def _read(path: Path) -> TrackedExecution | None:
    try:
        return TrackedExecution.read(path)
    except (FileNotFoundError, ValueError, TypeError):
        return None  # none, or from another version of this package


class _DeliveryThread(threading.Thread):
    """All communication with MLflow, in the background."""

    def __init__(
        self,
        tracking: Tracking,
        outbox: Outbox,
        execution: TrackedExecution,
        delivery: Delivery,
        points: JournalPoints,
    ) -> None:
        super().__init__(name="mlflow", daemon=True)
        self.ending: Entry | None = None
        self.version: str | None = None
        self.trouble = "no answer in time"
        self._tracking = tracking
        self._outbox = outbox
        self._execution = execution
        self._delivery = delivery
        self._points, self._added = points, 0
        self._stale = outbox.get(execution.id)
        self._ending_asked = threading.Event()
        self._settled = threading.Event()
        self._delivered = False
        self._given_up = threading.Event()

    @property
    def experiment(self) -> str:
        """Id of the experiment; empty until the tracking server has answered."""
        return self._delivery.experiment

    def deliver(self, entry: Entry, patience: float) -> bool:
        """Deliver the rest of the outbox entry, waiting up to `patience` seconds; returns whether all is delivered."""
        self.ending = entry
        self._ending_asked.set()
        self._settled.wait(patience)
        self._given_up.set()
        return self._delivered

    def run(self) -> None:
        while not self._given_up.is_set():
            try:
                with self._outbox.held(self._execution.id):
                    if self._stale:
                        self._outbox.remove(self._stale)
                    self._deliver()
                return
            except (BusyError, OSError) as error:
                self.trouble = explained(error)
                self._given_up.wait(_FIRST_PAUSE)

    def _deliver(self) -> None:
        """Send points as they arrive, retrying after errors, until the ending is delivered or given up."""
        opened, others_wait, failures = False, True, 0
        pause, answer_seconds, progress = _FIRST_PAUSE, ANSWER_SECONDS, 0
        limit_requests(answer_seconds)
        while not self._given_up.is_set():
            try:
                self._add_points()
                if not opened:
                    self._delivery.open(running=self.ending is None)
                    opened = True
                if self.ending:
                    self._deliver_ending(self.ending)
                    return
                self._delivery.send()
                pause, failures = _FIRST_PAUSE, 0
                if others_wait:
                    others_wait = False
                    self._outbox.deliver(self._tracking, stop=self._ending_asked.is_set)
                self._ending_asked.wait(_TICK_SECONDS)
            except Exception as error:  # training continues, whatever MLflow raises
                self.trouble, opened, failures = explained(error), False, failures + 1
                if failures == 1 and not self.ending:
                    _log.warning(
                        "%s · MLflow: %s; training continues, metrics are kept and sent later",
                        self._execution.job,
                        self.trouble,
                    )
                if self.ending and failures > 1 and is_refusal(error):
                    self._settled.set()
                    return
                if self._delivery.progress > progress:
                    pause, progress = _FIRST_PAUSE, self._delivery.progress
                if timed_out(error):
                    answer_seconds = min(2 * answer_seconds, _LONGEST_ANSWER)
                    limit_requests(answer_seconds)
                (self._given_up if self.ending else self._ending_asked).wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_AT_END if self.ending else _LONGEST_PAUSE)

    def _add_points(self) -> None:
        points = self._points.read(self._added)
        self._delivery.add(points)
        self._added += len(points)

    def _deliver_ending(self, ending: Entry) -> None:
        self._delivery.add(ending.points)
        self._delivery.reconcile()
        self.version = self._delivery.end(ending.ending, ending.artifacts)
        self._outbox.remove(ending)
        self._delivered = True
        self._settled.set()
