"""Ending all processes of a job, wherever they are, and no others."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator

import psutil
import pytest

from fedsft_assets.federation.runtimes.processes import MARK, execution_mark, marked_processes, stop_marked

_SLEEP = "import time; print('ready', flush=True); time.sleep(600)"
_IGNORE_SIGTERM = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {_SLEEP}"
_LEAVE_A_CHILD = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {_SLEEP!r}], start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
"""
_START_A_CHILD_WHEN_TOLD_TO_STOP = f"""
import signal, subprocess, sys
def stop(*_):
    child = subprocess.Popen([sys.executable, "-c", {_SLEEP!r}], start_new_session=True, stdout=subprocess.PIPE)
    child.stdout.readline()
    sys.exit()
signal.signal(signal.SIGTERM, stop)
{_SLEEP}
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def mark() -> str:
    return f"test {uuid.uuid4()}"


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a script that prints one line when it is ready; the test ends it."""
    started: list[subprocess.Popen[str]] = []

    def start_script(script: str, mark: str | None) -> "subprocess.Popen[str]":
        environment = {key: value for key, value in os.environ.items() if key != MARK}
        if mark is not None:
            environment[MARK] = mark
        process = subprocess.Popen(
            [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        return process

    yield start_script
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _ready(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_marked_process_is_found_and_terminated(start: Start, mark: str) -> None:
    process = start(_SLEEP, mark)
    _ready(process)
    assert [found.pid for found in marked_processes(mark)] == [process.pid]
    assert stop_marked(mark) == 1
    assert process.wait() == -signal.SIGTERM
    assert marked_processes(mark) == []


def test_grandchild_in_a_session_of_its_own_whose_parent_is_gone_is_ended(start: Start, mark: str) -> None:
    parent = start(_LEAVE_A_CHILD, mark)
    orphan = psutil.Process(int(_ready(parent)))
    parent.wait()
    assert orphan.ppid() != parent.pid
    assert os.getsid(orphan.pid) == orphan.pid
    assert stop_marked(mark) == 1
    assert not orphan.is_running() or orphan.status() == psutil.STATUS_ZOMBIE


def test_process_that_ignores_sigterm_is_killed(start: Start, mark: str) -> None:
    process = start(_IGNORE_SIGTERM, mark)
    _ready(process)
    assert stop_marked(mark, grace=0.3) == 1
    assert process.wait() == -signal.SIGKILL


def test_child_started_by_a_dying_parent_is_ended_too(start: Start, mark: str) -> None:
    _ready(start(_START_A_CHILD_WHEN_TOLD_TO_STOP, mark))
    assert stop_marked(mark) == 2
    assert marked_processes(mark) == []


def test_processes_without_the_mark_are_left_alone(start: Start, mark: str) -> None:
    ours, other, none = start(_SLEEP, mark), start(_SLEEP, f"{mark} and more"), start(_SLEEP, None)
    for process in (ours, other, none):
        _ready(process)
    assert stop_marked(mark) == 1
    assert (other.poll(), none.poll()) == (None, None)


def test_caller_that_carries_the_mark_lives_on(mark: str) -> None:
    script = (
        "import os\nfrom fedsft_assets.federation.runtimes.processes import MARK, stop_marked\n"
        "print(stop_marked(os.environ[MARK]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, MARK: mark}, capture_output=True, text=True, check=True
    )
    assert done.stdout == "0\n"


def test_zombie_is_not_counted(start: Start, mark: str) -> None:
    process = start("print('done')", mark)
    _ready(process)
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert marked_processes(mark) == []
    assert stop_marked(mark) == 0


def test_ending_one_execution_spares_the_next_and_ending_the_job_spares_none(mark: str, start: Start) -> None:
    first, second = execution_mark(mark), execution_mark(mark)
    for carried in (first, second, f"{mark}er"):
        process = start(_SLEEP, carried)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    assert len(marked_processes(mark)) == 2
    assert stop_marked(first) == 1
    assert len(marked_processes(second)) == 1
    assert stop_marked(mark) == 1
    assert marked_processes(mark) == []
    assert len(marked_processes(f"{mark}er")) == 1
