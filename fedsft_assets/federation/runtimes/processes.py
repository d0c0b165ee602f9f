"""Finding and ending every process of a job, including those that left its process group or lost their parent.

A job's processes carry a mark in their environment, which children inherit; no other process is ever ended. Each
execution of a job has its own mark, which begins with that of its workspace, so that ending one execution spares the
next. The mark of a folder also matches those of all folders in it.
"""

import contextlib
import os
import signal
import time
import uuid
from collections.abc import Collection

import psutil

MARK = "FEDSFT_JOB_MARK"
_EXECUTION = " execution "
_POLL_SECONDS = 0.1


def execution_mark(mark: str) -> str:
    """A new mark for one execution in the workspace that has this mark."""
    return f"{mark}{_EXECUTION}{uuid.uuid4().hex}"


def marked_processes(mark: str) -> list[psutil.Process]:
    """Living processes that carry the mark, or that of one of its executions, except the calling process."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.pid != os.getpid()
                and _matches(process.environ().get(MARK, ""), mark)
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
        except psutil.Error:
            continue  # ended meanwhile, or another user's
    return found


def stop_marked(mark: str, grace: float = 5.0, spare: Collection[int] = ()) -> int:
    """Send SIGTERM to all processes with the mark except the pids in `spare`, and SIGKILL after `grace` seconds.

    Repeats until none is left, since a dying parent may still start a child. Returns how many were found. Raises
    RuntimeError if some do not end.
    """
    seen: set[int] = set()
    started = time.monotonic()
    while processes := [process for process in marked_processes(mark) if process.pid not in spare]:
        waited = time.monotonic() - started
        if waited > grace + 30:
            pids = [process.pid for process in processes]
            raise RuntimeError(
                f"processes {pids} with the mark {mark!r} did not end {waited - grace:.0f} s after SIGKILL"
            )
        for process in processes:
            number = signal.SIGKILL if waited > grace else signal.SIGTERM
            if number == signal.SIGKILL or process.pid not in seen:
                seen.add(process.pid)
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(number)
        time.sleep(_POLL_SECONDS)
    return len(seen)


def _matches(carried: str, mark: str) -> bool:
    return carried == mark or carried.startswith((f"{mark}{_EXECUTION}", f"{mark}/"))
