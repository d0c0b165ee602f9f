"""What a command costs with all processes that come of it: wall and CPU seconds, peak memory of all together.

For Linux. Processes that leave their session or lose their parent are found by a mark in their environment, and
when they end this process is the one that learns what they took.
"""

import ctypes
import os
import resource
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.data import PROJECT, BenchmarkError

_MARK = "OVERHEAD_MARK"
_SECONDS_BETWEEN_SAMPLES = 0.5
_MOST_OF_A_CORE = 0.05  # that sampling may take, or else it is done less often
_SECONDS_TO_END = 20.0  # for what the command leaves running
_SET_CHILD_SUBREAPER = 36  # prctl(2)
_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")  # a second


@dataclass(frozen=True)
class Cost:
    """`begun` and `ended` are seconds since the epoch, memory is in GB: the sum over all processes at its peak.

    RSS counts a page for each process that has it, PSS once. `processes` is the largest number at one time.
    `other_cpu_seconds` are those of everything else on the machine meanwhile: figures are good where it did little.
    """

    begun: float
    ended: float
    cpu_seconds: float
    rss_gb: float
    pss_gb: float
    processes: int
    other_cpu_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return self.ended - self.begun


def cost(
    command: Sequence[str | Path], environment: Mapping[str, str], log: Path, seconds_to_end: float = _SECONDS_TO_END
) -> Cost:
    """Run a command from the project's root to its end; what it prints goes to `log`.

    Whatever it leaves running is counted too, and ended. For a process with no other children: this one becomes the
    parent of orphans, and waits for whatever child has ended. Raises BenchmarkError if the command fails.
    """
    _adopt_orphans()
    mark = uuid.uuid4().hex
    before, all_before = _cpu_seconds_of_children(), _cpu_seconds_of_all()
    begun = time.time()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=PROJECT,
            env={**environment, _MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    tree = _Tree(process.pid, mark)
    sampler = threading.Thread(target=tree.watch)
    sampler.start()
    try:
        code = process.wait()
        ended = time.time()
    finally:
        tree.stop.set()
        sampler.join()
        tree.end(seconds_to_end)
        process.wait()
    if code:
        said = log.read_text(encoding="utf-8", errors="replace")[-4000:]
        raise BenchmarkError(f"{' '.join(map(str, command))} ended with {code}:\n{said}")
    # Neither counts all: who ignores its children's ends keeps their seconds to itself, and samples miss the last ones.
    cpu_seconds = max(_cpu_seconds_of_children() - before, tree.cpu_seconds)
    others = max(0.0, _cpu_seconds_of_all() - all_before - cpu_seconds)
    return Cost(begun, ended, cpu_seconds, tree.rss / 1e9, tree.pss / 1e9, tree.processes, others)


class _Tree:
    """The processes of one command, and the most memory that they had together at the times when it was looked at."""

    def __init__(self, root: int, mark: str) -> None:
        self.stop = threading.Event()
        self.rss, self.pss, self.processes = 0, 0, 0
        self._root, self._needle = root, f"{_MARK}={mark}".encode()
        self._belongs: dict[tuple[int, str], bool] = {}  # by process id and start time
        self._ticks: dict[tuple[int, str], int] = {}  # of CPU, of each process that belongs, as last seen

    @property
    def cpu_seconds(self) -> float:
        """Of all processes, as far as they were seen."""
        return sum(self._ticks.values()) / _TICKS

    def watch(self) -> None:
        """Take samples until told to stop."""
        pause = 0.0
        while not self.stop.wait(pause):
            begun = time.thread_time()
            self._sample()
            _reap(self._root)
            pause = max(_SECONDS_BETWEEN_SAMPLES, (time.thread_time() - begun) / _MOST_OF_A_CORE)

    def end(self, seconds: float) -> None:
        """Have every process end, by force if it takes too long."""
        deadline = time.monotonic() + seconds
        while living := self._living():
            if self.stop.is_set() and time.monotonic() > deadline:
                for pid in living:
                    _kill(pid)
            _reap(self._root)
            time.sleep(0.05)
        _reap(self._root)

    def _sample(self) -> None:
        sizes = [size for pid in self._living() if (size := _size(pid))]
        self.rss = max(self.rss, sum(rss for rss, _ in sizes))
        self.pss = max(self.pss, sum(pss for _, pss in sizes))
        self.processes = max(self.processes, len(sizes))

    def _living(self) -> list[int]:
        """Process ids of those that belong to the command and have not ended."""
        found: list[int] = []
        belongs: dict[tuple[int, str], bool] = {}
        for pid in sorted(int(path.name) for path in _PROC.glob("[0-9]*")):
            state = _state(pid)
            if state is None:
                continue
            started, parent, ticks = state
            known = self._belongs.get((pid, started))
            own = self._is_own(pid, parent, found) if known is None else known
            belongs[pid, started] = own
            if own:
                found.append(pid)
                self._ticks[pid, started] = ticks
        self._belongs = belongs
        return found

    def _is_own(self, pid: int, parent: int, found: list[int]) -> bool:
        if pid == self._root or parent in found:
            return True
        try:
            return self._needle in (_PROC / str(pid) / "environ").read_bytes()
        except OSError:
            return False


def _state(pid: int) -> tuple[str, int, int] | None:
    """When a process started, its parent's id and its ticks of CPU, or None if it has ended. See proc(5) on stat."""
    try:
        said = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    fields = said[said.rindex(")") + 2 :].split()
    return None if fields[0] in "ZX" else (fields[19], int(fields[1]), int(fields[11]) + int(fields[12]))


def _size(pid: int) -> tuple[int, int] | None:
    """RSS and PSS in bytes, or None if the process has ended."""
    try:
        lines = (_PROC / str(pid) / "smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    kilobytes = {name: int(value) for name, value, *_ in (line.replace(":", "").split() for line in lines)}
    return kilobytes.get("Rss", 0) * 1024, kilobytes.get("Pss", 0) * 1024


def _adopt_orphans() -> None:
    """Become the parent of descendants whose own has ended, so that their CPU seconds are counted here."""
    if ctypes.CDLL(None, use_errno=True).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


def _reap(root: int) -> None:
    """Take note of orphans that have ended; the command itself is waited for elsewhere."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid == root:
            return
        os.waitpid(ended.si_pid, os.WNOHANG)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _cpu_seconds_of_all() -> float:
    """Of the whole machine since its start, in and out of the kernel. See proc(5) on /proc/stat."""
    user, nice, system, _idle, _waiting, irq, soft_irq, *_ = map(
        int, (_PROC / "stat").read_text().splitlines()[0].split()[1:]
    )
    return (user + nice + system + irq + soft_irq) / _TICKS


def _cpu_seconds_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
