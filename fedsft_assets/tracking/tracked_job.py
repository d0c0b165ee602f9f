"""Tracking a job while it runs, without it ever waiting."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Self

from fedsft_assets.federation.protocol.job_report import MODEL_FILE, JobReport
from fedsft_assets.federation.protocol.phases import metric_name
from fedsft_assets.federation.protocol.points import Point
from fedsft_assets.store import Store
from fedsft_assets.tracking.delivery import Delivery
from fedsft_assets.tracking.mlflow_store import ANSWER_SECONDS, Tracking, answer_within, timed_out
from fedsft_assets.tracking.mlflow_values import JOB, distinct
from fedsft_assets.tracking.outbox import BusyError, Entry, Outbox, explained, is_refusal
from fedsft_assets.tracking.record import Ending, Registration, Status, TrackedExecution
from fedsft_assets.tracking.tensorboard import EventFiles

_TICK_SECONDS = 1.0  # points of so long are sent together
_FIRST_PAUSE, _LONGEST_PAUSE, _LONGEST_PAUSE_AT_END = 1.0, 30.0, 5.0  # before a request is tried again
_LONGEST_ANSWER = 120.0
_ENDED_PATIENCE = 10.0  # for a job that failed or was cancelled
_DISK_SECONDS = 30.0

Spent = Callable[[TrackedExecution], dict[str, float]]


@dataclass(frozen=True)
class Registered:
    """Where a finished job is found: its registered model, the version and its MLflow run.

    The last two are None while the tracking server has not said.
    """

    model: str
    version: str | None
    run_id: str | None


class TrackedJob:
    """One execution of a job in MLflow and TensorBoard, from construction to `finish` or the end of the `with` block.

    Nothing here waits for the tracking server but the end, which waits `tracking.patience` seconds at most; what is
    not delivered by then is in the store's outbox. `record` is the file with what is known of the last execution in the
    same place. If it has this `execution_id` too, this is a further attempt: its MLflow runs go on. If it has another
    one and its process died before it could say how it ended, it is closed as KILLED. `earlier` are the points of that
    last execution, whichever it is; `journal` gives all that this one has in its durable file. `spent` gives what an
    execution that did not end well has cost all the same, as single numbers by name.
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
        say: Callable[[str], object],
        record: Path,
        earlier: Sequence[Point] = (),
        journal: Callable[[], Iterable[Point]] = tuple,
        spent: Spent = lambda _: {},
    ) -> None:
        self._tracking = tracking
        self._spent = spent
        self._outbox = Outbox(store.outbox)
        self._record = record
        self._record_lock = threading.Lock()
        self._say = say = _never_raising(say)
        self._journal = journal
        self._logged: list[Point] = []
        last = _read(self._record)
        goes_on = last is not None and last.id == execution_id
        if last and goes_on:  # parameters stay, MLflow lets nobody change them
            self._execution = replace(last, tags={**last.tags, **tags}, ended=False)
        else:
            close_as_killed(self._record, self._outbox, earlier, spent)
            values = {name: str(value) for name, value in params.items()}
            self._execution = TrackedExecution(execution_id, job, sites, values, tags, note, round(time.time(), 3))
        self._execution.write(self._record)  # before anything is made under its id
        self._earlier = points = distinct(earlier) if goes_on else []
        delivery = Delivery(tracking, self._execution, self._save)
        delivery.add(points)
        self._events = _EventThread(store.tensorboard(job), points, say)
        self._delivery = _DeliveryThread(tracking, self._outbox, self._execution, delivery, say)
        self._events.start()
        self._delivery.start()

    @property
    def run_id(self) -> str | None:
        """Of the job's MLflow run; None until the tracking server has made it."""
        return self._execution.runs.get(JOB)

    def log(self, point: Point) -> None:
        """Have a point delivered soon. Never waits, never raises."""
        self._logged.append(point)
        self._events.points.put(point)
        self._delivery.points.put(point)

    def finish(self, report: JobReport, checkpoint: Path, artifacts: list[Path], model: str, data: str) -> Registered:
        """Deliver everything and end the MLflow runs well.

        `checkpoint` is the folder of the archive and its report, which becomes a version of the registered `model`.
        The alias `champion` goes to the version with the lowest test loss among those scored on the same `data`
        (its digest). Raises OSError if the outbox cannot be written.
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
        return Registered(model, self._delivery.version, self.run_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: object, _traceback: object) -> None:
        """A cancelled job is KILLED, a failed one FAILED; `finish` comes before for one that went well."""
        if kind is None or self._delivery.ending:
            return
        status: Status = "FAILED" if issubclass(kind, Exception) else "KILLED"
        try:
            entry = self._put(Ending(status, round(time.time(), 3), self._spent(self._execution)))
            self._execution.ended = True
            self._save(self._execution)
            self._deliver(entry, min(_ENDED_PATIENCE, self._tracking.patience))
        except OSError as error:  # what ended the job is what its user must see
            self._say(f"tracking: {explained(error)}")

    def _save(self, execution: TrackedExecution) -> None:
        with self._record_lock:
            if self._record.is_file():  # else the execution is finished, and what is left of it is in the outbox
                execution.write(self._record)

    def _put(self, ending: Ending, artifacts: Sequence[Path] = (), texts: dict[str, str] | None = None) -> Entry:
        """Have everything that belongs to the execution in the outbox, whatever happens from here on."""
        points = distinct([*self._earlier, *self._journal(), *self._logged])
        self._events.complete(points)
        return self._outbox.put(self._execution, points, ending, artifacts, texts)

    def _deliver(self, entry: Entry, patience: float) -> None:
        if not self._delivery.deliver(entry, patience):
            self._say(
                f"the tracking server has not taken everything ({self._delivery.trouble}); the rest waits in "
                f"{entry.folder} and is delivered by `fedsft track` or with the next job"
            )


def close_as_killed(record: Path, outbox: Outbox, points: Sequence[Point], spent: Spent = lambda _: {}) -> None:
    """Have the MLflow runs ended of an execution whose process died before it could say how it ended.

    `spent` is as TrackedJob has it.
    """
    last = _read(record)
    if last and not last.ended and not outbox.get(last.id):
        outbox.put(last, points, Ending("KILLED", round(time.time(), 3), spent(last)))
        replace(last, ended=True).write(record)


def _never_raising(say: Callable[[str], object]) -> Callable[[str], object]:
    """Saying something must end no thread."""

    def tell(text: str) -> None:
        with suppress(Exception):
            say(text)

    return tell


def _read(path: Path) -> TrackedExecution | None:
    try:
        return TrackedExecution.read(path)
    except (FileNotFoundError, ValueError, TypeError):
        return None  # there is none, or one of another version of this package


class _EventThread(threading.Thread):
    """Writes TensorBoard's event files: a disk may be slow, too."""

    def __init__(self, folder: Path, first: list[Point], say: Callable[[str], object]) -> None:
        super().__init__(name="tensorboard", daemon=True)
        self.points: SimpleQueue[Point | None] = SimpleQueue()
        self._all: list[Point] = []
        self._folder = folder
        self._first = first
        self._say = say

    def complete(self, points: list[Point]) -> None:
        """Have all these there, and end."""
        self._all = points
        self.points.put(None)
        self.join(_DISK_SECONDS)

    def run(self) -> None:
        try:
            files = EventFiles(self._folder, self._first)
            while True:
                points, ended = _taken(self.points)
                files.add(points)
                if ended:
                    files.complete(self._all)
                    return
        except Exception as error:  # curves to look at are no reason to fail
            self._say(f"TensorBoard's event files in {self._folder} are not complete: {explained(error)}")


class _DeliveryThread(threading.Thread):
    """Everything that talks to MLflow."""

    def __init__(
        self,
        tracking: Tracking,
        outbox: Outbox,
        execution: TrackedExecution,
        delivery: Delivery,
        say: Callable[[str], object],
    ) -> None:
        super().__init__(name="mlflow", daemon=True)
        self.points: SimpleQueue[Point | None] = SimpleQueue()
        self.ending: Entry | None = None
        self.version: str | None = None
        self.trouble = "there was no time for an answer"
        self._tracking = tracking
        self._outbox = outbox
        self._execution = execution
        self._delivery = delivery
        self._say = say
        self._stale = outbox.get(execution.id)
        self._ending_asked = threading.Event()
        self._settled = threading.Event()
        self._delivered = False
        self._given_up = threading.Event()

    def deliver(self, entry: Entry, patience: float) -> bool:
        """Deliver the rest, which is in the outbox, waiting so many seconds at most. Whether all of it is there."""
        self.ending = entry
        self._ending_asked.set()
        self.points.put(None)
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
        """Send points as they come, try again what failed, until the ending is delivered or given up."""
        opened, others_wait, failures = False, True, 0
        pause, answer_seconds, progress = _FIRST_PAUSE, ANSWER_SECONDS, 0
        while not self._given_up.is_set():
            try:
                with answer_within(answer_seconds):
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
                    self._outbox.deliver(self._tracking, self._say, stop=self._ending_asked.is_set)
                self._delivery.add(_taken(self.points)[0])
            except Exception as error:  # whatever MLflow says, training goes on
                self.trouble, opened, failures = explained(error), False, failures + 1
                if failures == 1 and not self.ending:
                    self._say(f"MLflow: {self.trouble}; training goes on, what is measured is kept and sent later")
                if self.ending and failures > 1 and is_refusal(error):
                    self._settled.set()
                    return
                if self._delivery.progress > progress:
                    pause, progress = _FIRST_PAUSE, self._delivery.progress
                if timed_out(error):
                    answer_seconds = min(2 * answer_seconds, _LONGEST_ANSWER)
                (self._given_up if self.ending else self._ending_asked).wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_AT_END if self.ending else _LONGEST_PAUSE)

    def _deliver_ending(self, ending: Entry) -> None:
        self._delivery.add(ending.points)
        self._delivery.reconcile()
        self.version = self._delivery.end(ending.ending, ending.artifacts)
        self._outbox.remove(ending)
        self._delivered = True
        self._settled.set()


def _taken(points: SimpleQueue[Point | None]) -> tuple[list[Point], bool]:
    """The next points, as many as come within a moment, and whether None has said that they are the last."""
    taken: list[Point] = []
    first = points.get()
    deadline = time.monotonic() + _TICK_SECONDS
    while first is not None:
        taken.append(first)
        try:
            first = points.get(timeout=max(0.0, deadline - time.monotonic()))
        except Empty:
            return taken, False
    return taken, True
