"""The benchmark of the noise: both ways add as much, and the target is its last line."""

import subprocess
import sys

import pytest
import torch

from benchmarks.noise import PRIVACY, with_seed
from fedsft_assets.federation.site.update_filters import ChangeFilter
from fedsft_assets.settings import PROJECT
from fedsft_assets.specs.job import FiltersSpec


def test_both_ways_clip_and_blur_alike():
    for privatized in (with_seed, ChangeFilter(FiltersSpec(privacy=PRIVACY)).privatized):
        change = {"w": torch.full((100_000,), 1.0)}
        privatized(change)
        assert change["w"].mean().item() == pytest.approx(100_000**-0.5, rel=0.01)
        assert change["w"].std().item() == pytest.approx(PRIVACY.deviation, rel=0.02)


@pytest.mark.slow
def test_target_is_the_last_line():
    command = [sys.executable, "-m", "benchmarks.noise", "--layers", "0", "--repeats", "1", "--threads", "1"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    name, value, target, verdict = done.stdout.splitlines()[-1].split()
    assert (name, target) == ("noise_time", "2")
    assert verdict == ("ok" if float(value) <= 2 else "short")
