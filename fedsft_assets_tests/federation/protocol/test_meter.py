"""What a process measures of itself, on top of what earlier ones have left."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedsft_assets.federation.protocol.meter import Meter, MeterError, Usage

_HOLD = """
import sys
from pathlib import Path
from fedsft_assets.federation.protocol.meter import Meter

meter = Meter(Path(sys.argv[1]), "one")
meter.sent(1000)
held = b"x" * (300 << 20)
meter.read()
del held
meter.received(70)
print(flush=True)
sys.stdin.read()
"""


def test_bytes_of_a_process_that_was_killed_still_count(tmp_path: Path) -> None:
    folder = tmp_path / "abc" / "site-1"
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout
        process.stdout.readline()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    meter = Meter(folder, "one")
    meter.sent(1)
    usage = meter.read()
    assert (usage.sent, usage.received) == (1001, 70)
    assert usage.peak_memory > 300 << 20
    assert usage.cpu_seconds > time.process_time()


def test_usage_is_that_of_all_processes_of_a_site(tmp_path: Path) -> None:
    Meter(tmp_path, "connection").received(50)
    other, own = Meter(tmp_path, "rank-1"), Meter(tmp_path, "rank-0")
    of_other = other.read()
    usage, of_own = own.read_all(), own.read()
    assert (usage.sent, usage.received) == (0, 50)
    assert of_other.cpu_seconds + time.process_time() == pytest.approx(usage.cpu_seconds, abs=1.0)
    assert usage.cpu_seconds > max(of_other.cpu_seconds, of_own.cpu_seconds)
    assert usage.peak_memory == max(of_other.peak_memory, of_own.peak_memory)


def test_cpu_seconds_are_those_of_this_process_alone() -> None:
    meter = Meter()
    before, own = meter.read().cpu_seconds, time.process_time()
    subprocess.run([sys.executable, "-c", "sum(range(10**8))"], check=True)
    sum(range(10**6))
    assert meter.read().cpu_seconds - before == pytest.approx(time.process_time() - own, abs=0.2)


def test_peak_memory_is_not_that_of_the_process_that_started_this_one() -> None:
    held = b"x" * (400 << 20)
    command = "from fedsft_assets.federation.protocol.meter import Meter; print(Meter().read().peak_memory)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert len(held) > int(done.stdout)


def test_process_without_a_folder_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Meter().sent(10)
    assert Meter().read().sent == 0
    assert list(tmp_path.iterdir()) == []


def test_empty_file_is_that_of_a_process_that_had_used_nothing(tmp_path: Path) -> None:
    (tmp_path / "usage-one").touch()
    assert Meter(tmp_path, "one").read().sent == 0


def test_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "usage-one").write_bytes(b"half")
    with pytest.raises(MeterError, match=r"usage-one: found 4 bytes, expected 32; remove the file"):
        Meter(tmp_path, "one")


def test_usage_of_two_processes_has_the_peak_of_the_larger() -> None:
    assert Usage(1, 2, 0.5, 70) + Usage(10, 20, 1.0, 50) == Usage(11, 22, 1.5, 70)


def test_points_are_of_the_site() -> None:
    points = Usage(1, 2, 0.12345, 70).points(round=3, samples=96, site="site-1")
    assert {point.name: point.value for point in points} == {
        "system/sent_bytes": 1.0,
        "system/received_bytes": 2.0,
        "system/cpu_seconds": 0.123,
        "system/peak_memory_bytes": 70.0,
    }
    assert {(point.round, point.samples, point.site) for point in points} == {(3, 96, "site-1")}
