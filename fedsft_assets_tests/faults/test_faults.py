"""Kills at random moments: of who executes the job, the supervisor, the server, a trainer."""

from pathlib import Path

import pytest

from fedsft_assets_tests.faults.campaign import run_campaign
from fedsft_assets_tests.prepared import prepare_home


@pytest.mark.slow
@pytest.mark.xdist_group("faults")
def test_nothing_is_lost_whatever_is_killed(tmp_path: Path) -> None:
    outcome = run_campaign(prepare_home(tmp_path / "home"), seed=20, kills=4)
    assert outcome.wrong == []
    assert outcome.recovered == outcome.injected == 4
