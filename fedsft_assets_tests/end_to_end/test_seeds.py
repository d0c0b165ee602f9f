"""A study over one seed that is extended to two: what was trained is found, and the rest is trained."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedsft_assets.evaluation.tables import Tables
from fedsft_assets.settings import PROJECT
from fedsft_assets_tests.clones import SMALL_JOB

pytestmark = pytest.mark.slow


def _study(home: Path, jobs: Path, *options: str) -> str:
    """The output of `fedsft study` over this home."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FEDSFT_")}
    done = subprocess.run(
        [sys.executable, "-m", "fedsft_assets.cli", "study", "--data", "sample", "--model", "tiny", *options],
        env={**environment, "FEDSFT_HOME": str(home), "FEDSFT_JOBS": str(jobs)},
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_study_over_one_seed_is_extended_to_two(tmp_path: Path) -> None:
    home, jobs = tmp_path / "home", tmp_path / "jobs"
    jobs.mkdir()
    (jobs / "fedavg.yaml").write_text(SMALL_JOB)
    first = _study(home, jobs)
    assert "submitted FLARE job" in first

    second = _study(home, jobs, "--seeds", "2")
    one, two = re.split(r"^seed 1235$", second, flags=re.MULTILINE)
    assert "already trained from the same inputs" in one
    assert "submitted FLARE job" not in one
    assert "submitted FLARE job" in two
    tables = Tables(home)
    assert sorted(tables.budgets()["seed"]) == [1234, 1235]
    losses = tables.losses()
    assert losses.groupby("model")["seed"].nunique().to_dict() == {"base_model": 2, "fedavg": 2}
    assert "Every job was trained with the seeds 1234, 1235" in second

    third = _study(home, jobs)  # the home remembers the seeds
    assert "submitted FLARE job" not in third
