"""Turns of trainers that share a machine, each in a process of its own."""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedsft_assets.federation.site import cpu_slots
from fedsft_assets.federation.site.cpu_slots import TURNS, make_turns, turn

_HOLD = """
import sys
from fedsft_assets.federation.site.cpu_slots import turn
with turn(lambda: None):
    print("has it", flush=True)
    sys.stdin.readline()
"""

Holder = Callable[[], "subprocess.Popen[str]"]


@pytest.fixture
def hold(tmp_path: Path, request: pytest.FixtureRequest) -> Holder:
    """Starts a process that has a turn until it reads a line, and returns when it has it."""
    make_turns(tmp_path / "turns", at_once=2)

    def start() -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", _HOLD],
            env={**os.environ, TURNS: str(tmp_path / "turns")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        request.addfinalizer(process.wait)
        request.addfinalizer(process.kill)
        assert process.stdout is not None
        assert process.stdout.readline() == "has it\n"
        return process

    return start


def test_without_a_folder_everybody_may_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TURNS, raising=False)
    with turn(pytest.fail), turn(pytest.fail):
        pass


@pytest.mark.parametrize("by", ["end", "kill"])
def test_who_comes_later_waits_until_one_has_ended(
    hold: Holder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    first, second = hold(), hold()
    monkeypatch.setenv(TURNS, str(tmp_path / "turns"))
    minutes = SimpleNamespace(monotonic=itertools.count(0, 61).__next__, sleep=time.sleep)
    monkeypatch.setattr(cpu_slots, "time", minutes)  # on which a minute passes between any two looks at it
    waited = []

    def waiting() -> None:
        waited.append(first.poll())
        if len(waited) == 2:
            first.communicate("\n") if by == "end" else first.kill()

    with turn(waiting):
        assert len(waited) >= 2
        assert second.poll() is None
