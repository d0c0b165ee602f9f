"""Measures what a job's processes use, in files that survive them: what was sent was sent, whoever was killed since."""

import os
import resource
import struct
import sys
import threading
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

from fedsft_assets.federation.protocol.costs import CPU_SECONDS, PEAK_MEMORY, RECEIVED, SENT
from fedsft_assets.federation.protocol.phases import round_to_ms
from fedsft_assets.federation.protocol.points import Point

_RECORD = struct.Struct("<QQdQ")
_FILES = "usage-{}"
_STATUS, _PEAK = Path("/proc/self/status"), b"VmHWM:"  # Linux
_KILOBYTE = 1024


class MeterError(ValueError):
    """The file of a meter is invalid."""


@dataclass(frozen=True)
class Usage:
    """What one or more processes have used.

    `sent` and `received` are bytes of NVFlare's frames (see `connections.traffic`). `cpu_seconds`, user and system, are
    those of the processes themselves: trainers start no others, and in a simulation the server's children are sites.
    `peak_memory` is the largest resident set of any one process in bytes, pages of mapped files included.
    """

    sent: int = 0
    received: int = 0
    cpu_seconds: float = 0.0
    peak_memory: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(
            self.sent + other.sent,
            self.received + other.received,
            self.cpu_seconds + other.cpu_seconds,
            max(self.peak_memory, other.peak_memory),
        )

    def points(self, round: int, samples: int, site: str) -> list[Point]:
        """The usage of a site's trainer, one point per metric."""
        values = {
            SENT: float(self.sent),
            RECEIVED: float(self.received),
            CPU_SECONDS: round_to_ms(self.cpu_seconds),
            PEAK_MEMORY: float(self.peak_memory),
        }
        return [Point(name, value, round, samples, site) for name, value in values.items()]


class Meter:
    """Measures this process, on top of what earlier ones have left in `folder`; without a folder, this process alone.

    Each of several processes has a `name`. Traffic is written when it happens, the rest at every `read`: of a killed
    process, only CPU seconds since then are lost. The files may be lost in a power failure. Thread-safe.
    """

    def __init__(self, folder: Path | None = None, name: str = "process") -> None:
        """Raises MeterError naming the file, and OSError."""
        self._lock = threading.Lock()
        self._folder, self._path = folder, folder / _FILES.format(name) if folder else None
        self._file: int | None = None
        self._before = self._own = Usage()
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            weakref.finalize(self, os.close, self._file)
            self._before = _read(self._path)
            self._write()  # takes the disk space now, so that later ones cannot lack it

    def sent(self, size: int) -> None:
        """Count bytes that are sent."""
        with self._lock:
            self._own = replace(self._own, sent=self._own.sent + size)
            self._write()

    def received(self, size: int) -> None:
        """Count bytes that have arrived."""
        with self._lock:
            self._own = replace(self._own, received=self._own.received + size)
            self._write()

    def read(self) -> Usage:
        """The usage of this process and of earlier ones."""
        with self._lock:
            self._own = replace(self._own, cpu_seconds=_cpu_seconds(), peak_memory=_peak_memory())
            return self._write()

    def read_all(self) -> Usage:
        """The usage of all processes with files in the folder, of the others as of when they last wrote theirs."""
        usage = self.read()
        for path in self._folder.glob(_FILES.format("*")) if self._folder else ():
            if path != self._path:
                usage += _read(path)
        return usage

    def _write(self) -> Usage:
        usage = self._before + self._own
        if self._file is not None:
            record = _RECORD.pack(usage.sent, usage.received, usage.cpu_seconds, usage.peak_memory)
            os.pwrite(self._file, record, 0)
        return usage


def _read(path: Path) -> Usage:
    content = path.read_bytes()
    if not content:  # its process was killed before it could write
        return Usage()
    try:
        return Usage(*_RECORD.unpack(content))
    except struct.error as error:
        raise MeterError(
            f"{path}: found {len(content)} bytes, expected {_RECORD.size}; remove the file: the job's costs so far will"
            " be missing from its report"
        ) from error


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _peak_memory() -> int:
    """Bytes. On Linux, getrusage(2) would include the process that this one was started from."""
    if _STATUS.exists():
        (line,) = (line for line in _STATUS.read_bytes().splitlines() if line.startswith(_PEAK))
        return int(line.split()[1]) * _KILOBYTE
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else _KILOBYTE)
