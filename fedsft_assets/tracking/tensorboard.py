"""TensorBoard's event files of a job's curves, over the same axis as in MLflow: records trained on so far.

TensorBoard's "runs" are folders here: the job's own has its global curves, and one in it for each site.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fedsft_assets.federation.metrics import Point
from fedsft_assets.tracking.values import JOB, distinct

if TYPE_CHECKING:
    from tensorboard.summary.writer.record_writer import RecordWriter

_VERSION = "brain.Event:2"


class EventFiles:
    """The event files of one execution in `folder`, in place of those of earlier ones, beginning with `points`."""

    def __init__(self, folder: Path, points: Iterable[Point] = ()) -> None:
        self._folder = folder
        self._writers: dict[str, RecordWriter] = {}
        self._written: set[Hashable] = set()
        self._start_over(points)

    def add(self, points: Iterable[Point]) -> None:
        """Write points that are not there yet. Raises OSError."""
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

    def complete(self, points: Iterable[Point]) -> None:
        """Have all points of the execution there, in their order, and close the files. Raises OSError.

        TensorBoard drops what follows a point that comes late, so if one is missing, the files are written anew.
        """
        points = distinct(points)
        if any(point.identity not in self._written for point in points):
            self._start_over(points)
        self.close()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _start_over(self, points: Iterable[Point]) -> None:
        self.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._written.clear()
        self.add(points)

    def _writer(self, role: str) -> RecordWriter:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        if role not in self._writers:
            folder = self._folder / role
            folder.mkdir(parents=True, exist_ok=True)
            # A TensorBoard that is open reads the files of a folder in the order of their names.
            file = (folder / f"events.out.tfevents.{time.time():.6f}.{uuid.uuid4().hex}").open("wb")
            writer = RecordWriter(file)
            now = time.time()
            writer.write(Event(wall_time=now, file_version=_VERSION).SerializeToString())
            # It also forgets what it has read of an execution before.
            start = SessionLog(status=SessionLog.START)
            writer.write(Event(wall_time=now, step=0, session_log=start).SerializeToString())
            self._writers[role] = writer
        return self._writers[role]
