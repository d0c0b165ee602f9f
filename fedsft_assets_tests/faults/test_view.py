"""Moments of an attempt are its own: what an earlier one has left does not count."""

import os
import time
from pathlib import Path

from fedsft_assets.federation.protocol.job_report import REPORT_FILE
from fedsft_assets.federation.protocol.journal import JOURNAL_FILE, Progress, to_line
from fedsft_assets.federation.supervisor.workspace import Execution, Workspace
from fedsft_assets_tests.faults.faults import Fault, Kind, Target, When
from fedsft_assets_tests.faults.view import View


def _fault(when: When, amount: float = 0.25) -> Fault:
    return Fault(Target.WORKER, Kind.KILL, when, amount)


def _touch(path: Path, since: float = 60.0) -> None:
    """A file that is so many seconds newer than now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (time.time() + since, time.time() + since))


def test_files_of_an_earlier_attempt_are_no_moment_of_this_one(tmp_path: Path) -> None:
    workspace, states = Workspace(tmp_path / "job"), tmp_path / "states"
    execution = workspace.save(Execution("one", {}))
    report, result = workspace.checkpoint / REPORT_FILE, states / execution.id / "results" / "0"
    _touch(report, since=-60.0)
    _touch(result, since=-60.0)
    view = View(workspace, states)
    moments = (When.REGISTRATION, When.TRANSFER)
    assert [view.due(_fault(when)) for when in moments] == [None, None]
    report.unlink()  # a new execution begins in an empty folder
    assert view.due(_fault(When.REGISTRATION)) is None
    _touch(report)
    _touch(result)
    assert [view.due(_fault(when)) for when in moments] == [0.25, 0.25]


def test_lines_count_from_the_beginning_of_the_attempt(tmp_path: Path) -> None:
    workspace, states = Workspace(tmp_path / "job"), tmp_path / "states"
    journal = states / workspace.save(Execution("one", {})).id / JOURNAL_FILE
    journal.parent.mkdir(parents=True)
    journal.write_text(to_line(Progress("before")) * 5)
    view = View(workspace, states)
    assert view.due(_fault(When.TRAINING, 2)) is None
    with journal.open("a") as file:
        file.write(to_line(Progress("one")) * 2)
    assert view.due(_fault(When.TRAINING, 2)) == 0.0
