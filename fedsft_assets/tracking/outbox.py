"""Keeps on disk what could not be delivered to the tracking server when a job ended.

An entry is a self-contained folder: the execution's record, all its points, its ending and artifacts. Delivery requires
the execution's lock, so that only one process delivers it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from fedsft_assets.credentials import redact
from fedsft_assets.federation.protocol.points import Point
from fedsft_assets.files import publish_folder
from fedsft_assets.tracking.delivery import Delivery, NotKeptError
from fedsft_assets.tracking.mlflow_store import ANSWER_SECONDS, Tracking, limit_requests
from fedsft_assets.tracking.promotion import Promotions
from fedsft_assets.tracking.record import Ending, TrackedExecution

_EXECUTION = "execution.json"
_POINTS = "points.jsonl"
_ENDING = "ending.json"
_ARTIFACTS = "artifacts"
_LATER = (408, 429)  # HTTP "request timeout" and "too many requests"

_log = logging.getLogger(__name__)


class BusyError(RuntimeError):
    """Another process is delivering the same execution."""


@dataclass(frozen=True)
class Undelivered:
    """An entry that could not be delivered, and why."""

    job: str
    folder: Path
    reason: str


@dataclass(frozen=True)
class Entry:
    """An ended execution to be delivered."""

    folder: Path
    execution: TrackedExecution
    ending: Ending

    @property
    def points(self) -> list[Point]:
        with (self.folder / _POINTS).open(encoding="utf-8") as file:
            return [Point(**json.loads(line)) for line in file]

    @property
    def artifacts(self) -> list[Path]:
        return sorted((self.folder / _ARTIFACTS).iterdir())

    def save(self, execution: TrackedExecution) -> None:
        execution.write(self.folder / _EXECUTION)


@dataclass(frozen=True)
class Outbox:
    """The entries in `folder`, one per undelivered execution."""

    folder: Path

    def entries(self) -> list[str]:
        """Ids of the pending executions, oldest first. Cheap if there are none."""
        try:
            names = [entry.name for entry in os.scandir(self.folder) if entry.is_dir() and entry.name[0] != "."]
        except FileNotFoundError:
            return []
        return sorted(names, key=lambda name: self._age(self.folder / name))

    @property
    def is_empty(self) -> bool:
        """Whether nothing is pending, neither executions nor decisions about champions."""
        return not self.entries() and not Promotions(self.folder).pending()

    def put(
        self,
        execution: TrackedExecution,
        points: Iterable[Point],
        ending: Ending,
        artifacts: Iterable[Path] = (),
        texts: dict[str, str] | None = None,
    ) -> Entry:
        """Atomically store everything to be delivered, replacing an earlier entry of this execution.

        `artifacts` are files to copy; `texts` are contents of further artifacts by file name.
        """
        target = self.folder / execution.id
        with publish_folder(target) as folder:
            execution.write(folder / _EXECUTION)
            ending.write(folder / _ENDING)
            lines = "".join(json.dumps(asdict(point)) + "\n" for point in points)
            (folder / _POINTS).write_text(lines, encoding="utf-8")
            (folder / _ARTIFACTS).mkdir()
            for artifact in artifacts:
                shutil.copyfile(artifact, folder / _ARTIFACTS / artifact.name)
            for name, text in (texts or {}).items():
                (folder / _ARTIFACTS / name).write_text(text, encoding="utf-8")
        return Entry(target, execution, ending)

    def get(self, execution_id: str) -> Entry | None:
        folder = self.folder / execution_id
        if not folder.is_dir():
            return None
        return Entry(folder, TrackedExecution.read(folder / _EXECUTION), Ending.read(folder / _ENDING))

    def remove(self, entry: Entry) -> None:
        """Remove a delivered entry, unless a later ending of the same execution has replaced it."""
        now = self.get(entry.execution.id)
        if now and now.ending == entry.ending:
            shutil.rmtree(entry.folder)

    @contextmanager
    def held(self, execution_id: str) -> Iterator[None]:
        """Hold the lock for delivering this execution. Raises BusyError if another process holds it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f".{execution_id}.lock"
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                removed = os.fstat(handle).st_ino != path.stat().st_ino
            except (BlockingIOError, FileNotFoundError):
                removed = True
            if removed:
                raise BusyError("another process is delivering it")
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
        finally:
            os.close(handle)

    def deliver(
        self,
        tracking: Tracking,
        stop: Callable[[], bool] = lambda: False,
        answer_seconds: int = ANSWER_SECONDS,
    ) -> list[Undelivered]:
        """Deliver pending entries, logging a line for each; returns those that remain, with the reasons.

        Stops at the first entry without an answer, and starts no further one once `stop()` is true. Each request may
        take `answer_seconds`.
        """
        remaining: list[Undelivered] = []
        unreachable = ""
        limit_requests(answer_seconds)
        for execution_id in self.entries():
            if not unreachable and stop():
                unreachable = "no time left"
            job, reason = "a job", unreachable
            try:
                with self.held(execution_id):
                    entry = self.get(execution_id)
                    if entry is None:
                        continue  # delivered meanwhile
                    job = entry.execution.job
                    if not unreachable:
                        version = deliver_entry(tracking, entry)
                        self.remove(entry)
                        _log.info("%s: delivered to MLflow%s", job, f", as version {version}" if version else "")
                        continue
            except BusyError as error:
                reason = str(error)
            except Exception as error:  # keep the entry and try the others
                reason = explained(error)
                unreachable = "" if is_refusal(error) else reason
            remaining.append(Undelivered(job, self.folder / execution_id, reason))
        return remaining + self.deliver_promotions(tracking, lambda: bool(unreachable) or stop())

    def deliver_promotions(self, tracking: Tracking, stop: Callable[[], bool] = lambda: False) -> list[Undelivered]:
        """Deliver the pending decisions about champions; returns those that remain. Starts none once `stop()`."""
        promotions, remaining = Promotions(self.folder), []
        for path in promotions.pending():
            reason = "the tracking server does not answer, or no time is left"
            try:
                if not stop():
                    promotions.deliver(tracking, path, self._registering())
                    continue
            except BlockingIOError:
                reason = "another process is delivering it"
            except Exception as error:  # keep it and try the others
                reason = explained(error)
            remaining.append(Undelivered(path.stem, path, reason))
        return remaining

    def _registering(self) -> set[str]:
        """Digests of the checkpoints that wait to be registered."""
        pending = [entry for execution_id in self.entries() if (entry := self.get(execution_id))]
        return {entry.ending.registration.digest for entry in pending if entry.ending.registration}

    @staticmethod
    def _age(folder: Path) -> float:
        try:
            return (folder / _ENDING).stat().st_mtime
        except FileNotFoundError:
            return 0.0


def deliver_entry(tracking: Tracking, entry: Entry) -> str | None:
    """Deliver an entry to MLflow and verify it; returns the version of its checkpoint, if any.

    Can be repeated after any failure. Raises MLflow's errors.
    """
    delivery = Delivery(tracking, entry.execution, entry.save)
    delivery.add(entry.points)
    delivery.open(running=False)
    delivery.reconcile()
    return delivery.end(entry.ending, entry.artifacts)


def is_refusal(error: BaseException) -> bool:
    """Whether MLflow rejected the content, as opposed to being unreachable: retrying would not help."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return 400 <= error.get_http_status_code() < 500 and error.get_http_status_code() not in _LATER
    return isinstance(error, NotKeptError | FileNotFoundError | ValueError | TypeError)


def explained(error: BaseException) -> str:
    """The error on one line, without secrets or SQL statements."""
    text = " ".join(redact(str(error)).partition("[SQL: ")[0].split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:150]} … {text[-150:]}"
