"""Kills at random moments: of who executes the job, the supervisor, the server, a site, a trainer."""

import tempfile
from pathlib import Path

import pytest

from fedsft_assets_tests.faults.campaign import Campaign
from fedsft_assets_tests.prepared import prepare_home

pytestmark = pytest.mark.slow


def test_nothing_is_lost_whatever_is_killed_in_the_simulator(tmp_path: Path) -> None:
    campaign = Campaign(prepare_home(tmp_path / "home"), "simulator", seed=6)
    outcome = campaign.run(18, ["three sites", "bf16 differences"])
    assert outcome.wrong == []
    assert outcome.recovered == outcome.injected == 18


def test_nothing_is_lost_whatever_is_killed_in_a_poc(tmp_path: Path) -> None:
    store = prepare_home(tmp_path / "home")
    outcome = Campaign(store, "poc", seed=50).run(12, ["three sites"])
    assert outcome.wrong == []
    assert outcome.recovered == outcome.injected == 12
    jobs = {folder.name for folder in (store.home / "poc" / "jobs").iterdir()}
    assert jobs
    assert [path for path in Path(tempfile.gettempdir()).iterdir() if path.name in jobs] == []
