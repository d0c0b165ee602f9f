"""What can be seen of an attempt from outside, by the files that it and its server write: when a moment has come."""

import time
from pathlib import Path

from fedsft_assets.federation.protocol.job_report import REPORT_FILE
from fedsft_assets.federation.protocol.journal import JOURNAL_FILE, Finished, RoundDone, from_line
from fedsft_assets.federation.protocol.points import Point
from fedsft_assets.federation.protocol.tail import Tail
from fedsft_assets.federation.supervisor.workspace import Execution, Workspace
from fedsft_assets_tests.faults.faults import Fault, When


class View:
    """Of the attempt that begins now. `states` are those of executions at the server."""

    def __init__(self, workspace: Workspace, states: Path) -> None:
        self._begun, self._begun_ns = time.monotonic(), time.time_ns()
        self._workspace, self._states = workspace, states
        self._report = workspace.checkpoint / REPORT_FILE
        self._earlier = self._execution()  # which this attempt may go on with, or not
        self._earlier_lines = self._server_lines()

    def due(self, fault: Fault) -> float | None:
        """Seconds until the fault is due, or None while its moment has not come."""
        match fault.when:
            case When.BEFORE:
                return 0.0
            case When.NEXT:
                return fault.amount
            case When.START:
                return max(0.0, self._begun + fault.amount - time.monotonic())
            case When.TRAINING:
                return 0.0 if len(self._new_lines()) >= fault.amount else None
        return fault.amount if self._has_come(fault.when) else None

    def _has_come(self, when: When) -> bool:
        match when:
            case When.SUBMISSION:
                execution = self._execution()
                known = self._earlier.submissions if self._goes_on() and self._earlier else 0
                return execution is not None and execution.submissions > known
            case When.TRANSFER:
                before = self._begun_ns  # a server that was killed may have left some
                return any(_changed(path) > before for path in (self._state() / "results").rglob("*"))
            case When.AVERAGING:
                return self._a_round_ends()
            case When.SAVING:
                return any(self._state().glob("model-*.new"))
            case When.CHECKPOINT:
                execution = self._execution()
                fetched = execution is not None and bool(execution.status) and not execution.ended
                return fetched or any(isinstance(from_line(line), Finished) for line in self._new_lines()[-1:])
            case _:
                return _changed(self._report) > self._begun_ns

    def _a_round_ends(self) -> bool:
        """All results of a round beyond the first are scored, and the model that they make is not on the disk."""
        for line in reversed(self._new_lines()):
            entry = from_line(line)
            if isinstance(entry, RoundDone):
                return False
            if isinstance(entry, Point) and entry.name == "val_loss" and entry.site is None:
                return True
        return False

    def _goes_on(self) -> bool:
        """Whether the execution is that of the attempt before."""
        execution = self._execution()
        return execution is not None and self._earlier is not None and execution.id == self._earlier.id

    def _new_lines(self) -> list[str]:
        """What this attempt's server has written down."""
        return self._server_lines()[len(self._earlier_lines) if self._goes_on() else 0 :]

    def _execution(self) -> Execution | None:
        return self._workspace.execution()

    def _state(self) -> Path:
        execution = self._execution()
        return self._states / (execution.id if execution else "none")

    def _server_lines(self) -> list[str]:
        """Whole lines of the server's journal."""
        return Tail(self._state() / JOURNAL_FILE).new_lines()


def _changed(path: Path) -> int:
    """When it was, in nanoseconds since the epoch; 0 if it is not there."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0
