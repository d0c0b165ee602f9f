"""Writes a job's curves as TensorBoard event files, over the same x axis as in MLflow: records trained on so far.

TensorBoard's "runs" are folders: one with the job's global curves, named after its start time, with a subfolder per
site. Rewritten curves get a new folder: an open TensorBoard drops a removed folder, but never rereads the beginning of
a known one.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Hashable, Iterable
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from fedsft_assets.federation.protocol.points import Point
from fedsft_assets.files import locked
from fedsft_assets.tracking.journal_points import JournalPoints
from fedsft_assets.tracking.mlflow_values import JOB
from fedsft_assets.tracking.outbox import explained

if TYPE_CHECKING:
    from tensorboard.summary.writer.record_writer import RecordWriter

_VERSION = "brain.Event:2"
_TICK_SECONDS = 1.0  # between reads of the journal
_DISK_SECONDS = 30.0

_log = logging.getLogger(__name__)


class EventFiles:
    """Event files of one execution in `folder`, replacing those of earlier ones; starts with `points`.

    Files of concurrent executions are kept: their writers hold a lock.
    """

    def __init__(self, folder: Path, points: Iterable[Point] = ()) -> None:
        self._writers: dict[str, RecordWriter] = {}
        self._written: set[Hashable] = set()
        self._held = ExitStack()
        for earlier in folder.glob("*/"):
            with suppress(BlockingIOError, FileNotFoundError), locked(earlier, wait=False):
                shutil.rmtree(earlier, ignore_errors=True)
        self._place = folder / datetime.now().strftime("%Y-%m-%d %H:%M:%S.%f")
        self._place.mkdir(parents=True)
        self._held.enter_context(locked(self._place))
        self.add(points)

    def add(self, points: Iterable[Point]) -> None:
        """Write new points in order: TensorBoard drops points after one that is out of order.

        Raises OSError.
        """
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        for point in points:
            if point.identity in self._written:
                continue
            self._written.add(point.identity)
            summary = Summary(value=[Summary.Value(tag=point.name, simple_value=point.value)])
            event = Event(wall_time=point.time, step=point.samples, summary=summary)
            self._writer(point.site or JOB).write(event.SerializeToString())
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
        self._held.close()

    def _writer(self, role: str) -> RecordWriter:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        if role not in self._writers:
            folder = self._place / role
            folder.mkdir(parents=True, exist_ok=True)
            writer = RecordWriter((folder / f"events.out.tfevents.{int(time.time())}.fedsft").open("wb"))
            writer.write(Event(wall_time=time.time(), file_version=_VERSION).SerializeToString())
            self._writers[role] = writer
        return self._writers[role]


class EventThread(threading.Thread):
    """Writes TensorBoard event files in the background: disks may be slow, too."""

    def __init__(self, folder: Path, points: JournalPoints) -> None:
        super().__init__(name="tensorboard", daemon=True)
        self._folder, self._points = folder, points
        self._ended = threading.Event()

    def complete(self) -> None:
        """Write the remaining points and end the thread."""
        self._ended.set()
        self.join(_DISK_SECONDS)

    def run(self) -> None:
        try:
            files, written, ended = EventFiles(self._folder), 0, False
            while not ended:
                ended = self._ended.is_set()  # read before the points: the last read gets all
                points = self._points.read(written)
                files.add(points)
                written += len(points)
                self._ended.wait(_TICK_SECONDS)
            files.close()
        except Exception as error:  # not worth failing a job
            _log.warning("TensorBoard event files in %s are incomplete: %s", self._folder, explained(error))
