"""Disks that are full and homes that cannot be written: one line, whoever noticed it, and not of anything else."""

import errno
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedsft_assets.disk import explain, explain_text
from fedsft_assets.settings import PROJECT


def _raised(error: Exception, cause: Exception | None = None) -> Exception:
    try:
        raise error from cause
    except Exception as raised:
        return raised


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_is_said_with_the_file_and_what_is_free(tmp_path: Path, number: int) -> None:
    file = tmp_path / "home" / "x.jsonl"
    said = explain(OSError(number, os.strerror(number), str(file)), tmp_path / "home")
    assert said
    assert said.startswith(f"{file}: no space left on its disk (")
    assert f" MB free in {tmp_path}/home); free some space and run it again: finished work is kept" in said


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_home_that_cannot_be_written_is_said_with_the_user(tmp_path: Path, number: int) -> None:
    for file in (tmp_path / "home/x", tmp_path / "home", tmp_path):  # of a new home, the folder around it
        said = explain(_raised(RuntimeError("failed"), OSError(number, "", str(file))), tmp_path / "home")
        assert said
        assert said.startswith(f"{file}: user {os.geteuid()} cannot write there: {os.strerror(number)} (")
        assert said.endswith("or set FEDSFT_HOME to a folder where it can")
    assert explain(OSError(number, "", "/somewhere/else"), tmp_path / "home") is None


def test_what_sqlite_says_of_it_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = _raised(RuntimeError("pages"), sqlite3.OperationalError("database or disk is full"))
    assert "no space left on its disk" in str(explain(full, tmp_path))
    forbidden = _raised(RuntimeError("pages"), sqlite3.OperationalError("attempt to write a readonly database"))
    assert "cannot write there: attempt to write a readonly database" in str(explain(forbidden, tmp_path))
    perhaps = sqlite3.OperationalError("disk I/O error")  # a disk that is broken too
    assert explain(perhaps, tmp_path) is None
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    assert "no space left on its disk" in str(explain(perhaps, tmp_path))


def test_other_errors_are_not_explained_away(tmp_path: Path) -> None:
    for error in (ValueError("No space left on device"), OSError(errno.ENOENT, "", str(tmp_path)), KeyError("x")):
        assert explain(error, tmp_path) is None
    assert explain_text("Traceback\nValueError: a row is bad", tmp_path) is None
    assert "no space left" in str(explain_text("Traceback\nOSError: [Errno 28] No space left on device", tmp_path))


_WRITES = """
import os, subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
from fedsft_assets.disk import one_line_when_full
with one_line_when_full(Path(sys.argv[1])):
    for line in sys.argv[2:]:
        subprocess.run([sys.executable, "-c", "import sys; print(sys.argv[1], file=sys.stderr)", line])
print("after", file=sys.stderr)
"""


def _stderr(home: Path, *lines: str) -> list[str]:
    command = [sys.executable, "-c", _WRITES, str(home), *lines]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    return done.stderr.splitlines()


def test_standard_error_is_what_was_written(tmp_path: Path) -> None:
    assert _stderr(tmp_path, "a warning", "Traceback", "an error") == ["a warning", "Traceback", "an error", "after"]


def test_pages_about_a_full_disk_become_one_line(tmp_path: Path) -> None:
    pages = ["Traceback of A", "(sqlite3.OperationalError) database or disk is full", "Traceback of B", "more"]
    one, after = _stderr(tmp_path, *pages)
    assert one.startswith(f"{tmp_path}: no space left on its disk (")
    assert after == "after"
