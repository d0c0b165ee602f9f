"""The memory of a job's processes while it runs, by what each of them is."""

import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from fedsft_assets.federation.runtimes.processes import marked_processes

_SECONDS_BETWEEN_SAMPLES = 0.1
_SECONDS_BETWEEN_LOOKS = 1.0  # for processes that are new
_SITE = re.compile(r"--client (\S+)")
_ANONYMOUS = re.compile(rb"^Rss(?:Anon|Shmem):\s+(\d+) kB$", re.MULTILINE)


@dataclass
class Peaks:
    """Largest anonymous memory in bytes (RssAnon and RssShmem of /proc): of each process, and of all at one time.

    Pages of files are not in it: the kernel takes them back when it wants to. `least_free` is the least that the
    machine had available meanwhile, pages of files counted as free where they can be taken back.
    """

    each: dict[str, int] = field(default_factory=dict)
    together: int = 0
    least_free: int = field(default_factory=lambda: psutil.virtual_memory().available)

    def of(self, kind: str) -> int:
        """Of the largest process of a kind: `server`, `site` or `trainer`."""
        return max((peak for name, peak in self.each.items() if name.split()[0] == kind), default=0)


class MemoryWatch:
    """Looks at the processes that carry a mark, from the block's begin to its end."""

    def __init__(self, mark: str) -> None:
        self.peaks = Peaks()
        self._mark, self._ended = mark, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._processes: dict[int, str] = {}

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        looked = 0.0
        while not self._ended.wait(_SECONDS_BETWEEN_SAMPLES):
            if time.monotonic() - looked > _SECONDS_BETWEEN_LOOKS:
                looked = time.monotonic()
                self._processes = {process.pid: _name(process) for process in marked_processes(self._mark)}
            self._sample()

    def _sample(self) -> None:
        together = 0
        for pid, name in self._processes.items():
            memory = anonymous_memory(pid)
            together += memory
            self.peaks.each[name] = max(memory, self.peaks.each.get(name, 0))
        self.peaks.together = max(together, self.peaks.together)
        self.peaks.least_free = min(psutil.virtual_memory().available, self.peaks.least_free)


def anonymous_memory(pid: int) -> int:
    """Bytes of a process; 0 of one that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_bytes()
    except OSError:
        return 0
    return sum(int(kilobytes) << 10 for kilobytes in _ANONYMOUS.findall(status))


def _name(process: psutil.Process) -> str:
    """What the process is in the job; a trainer is known by the site whose NVFlare process started it."""
    try:
        command = " ".join(process.cmdline())
        if "transfer.site" in command or "train.py" in command:
            parent = process.parent()
            return f"trainer {_site(' '.join(parent.cmdline())) if parent else process.pid}"
        return f"site {_site(command)}" if "simulator_worker" in command else "server"
    except psutil.Error:
        return "gone"


def _site(command: str) -> str:
    found = _SITE.search(command)
    return found[1] if found else "unknown"
