"""Points of curves, and the durable file that they are appended to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedsft_assets.federation.metrics import Point, append_points, parse_point, points_from_data, points_to_data

POINTS = [
    Point("val_loss", 7.178342342, 0, 0),
    Point("train_loss", 1e-9, 3, 480, "site-1", 7, 1234),
    Point("val_loss_local", float("inf"), 3, 480, "site-é"),
]


def test_points_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_points(path, POINTS[:1])
    append_points(path, POINTS[1:])
    assert [parse_point(line) for line in path.read_text(encoding="utf-8").splitlines()] == POINTS


def test_points_survive_the_metadata_of_a_result() -> None:
    data = points_to_data(POINTS)
    assert all(isinstance(value, str | int | float | None) for point in data for value in point.values())
    assert points_from_data(data) == POINTS


def test_no_points_add_no_line(tmp_path: Path) -> None:
    append_points(tmp_path / "metrics.jsonl", [])
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_points_are_there_when_the_writer_is_killed_right_after(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    script = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from fedsft_assets.federation.metrics import Point, append_points\n"
        "append_points(Path(sys.argv[1]), [Point('val_loss', 2.5, 1, 16)])\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert killed.returncode == -9
    assert parse_point(path.read_text()) == Point("val_loss", 2.5, 1, 16)


def test_points_are_on_the_disk_when_the_call_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (sizes.append(os.fstat(handle).st_size), real(handle)))
    append_points(tmp_path / "metrics.jsonl", POINTS)
    assert sizes == [(tmp_path / "metrics.jsonl").stat().st_size]
