"""Finding and ending every process of a job, also those that left its process group or lost their parent.

A job's processes carry a mark in their environment, which children inherit. Nothing else is ever ended.
Each execution of a job has a mark of its own, which begins with its workspace's: whoever ends an execution
spares the next one. The mark of a folder stands for those of all folders in it.
"""

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
    """A new mark for one execution of what `mark` stands for."""
    return f"{mark}{_EXECUTION}{uuid.uuid4().hex}"


def marked_processes(mark: str) -> list[psutil.Process]:
    """Living processes that carry the mark, or that of one of its executions; this one left out."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                process.pid != os.getpid()
                and _is_of(process.environ().get(MARK, ""), mark)
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
        except psutil.Error:
            continue  # ended meanwhile, or not ours to look at
    return found


def stop_marked(mark: str, grace: float = 5.0, spare: Collection[int] = ()) -> int:
    """End all processes that carry the mark, but for these: politely, and after `grace` seconds by force.

    Looks again until none is left, since a dying parent may still start a child. Returns how many were
    found. Raises RuntimeError if some cannot be ended.
    """
    seen: set[int] = set()
    begun = time.monotonic()
    while processes := [one for one in marked_processes(mark) if one.pid not in spare]:
        waited = time.monotonic() - begun
        if waited > grace + 30:
            raise RuntimeError(f"processes {[p.pid for p in processes]} of {mark} do not end")
        for process in processes:
            sign = signal.SIGKILL if waited > grace else signal.SIGTERM
            if sign == signal.SIGKILL or process.pid not in seen:
                seen.add(process.pid)
                _send(process, sign)
        time.sleep(_POLL_SECONDS)
    return len(seen)


def _is_of(carried: str, mark: str) -> bool:
    return carried == mark or carried.startswith((f"{mark}{_EXECUTION}", f"{mark}/"))


def _send(process: psutil.Process, sign: signal.Signals) -> None:
    try:
        process.send_signal(sign)
    except psutil.NoSuchProcess:
        pass
