"""Kills at random moments: of who executes the job, the supervisor, the server, a site, a trainer."""

import tempfile
from pathlib import Path

import pytest

from fedsft_assets_tests.faults.campaign import Campaign
from fedsft_assets_tests.prepared import prepare_home

pytestmark = pytest.mark.slow


@pytest.mark.xdist_group("faults")
def test_nothing_is_lost_whatever_is_killed_in_the_simulator(tmp_path: Path) -> None:
    campaign = Campaign(prepare_home(tmp_path / "home"), "simulator", seed=6)
    outcome = campaign.run(18, ["three sites", "bf16 differences"])
    assert outcome.wrong == []
    assert outcome.recovered == outcome.injected == 18


@pytest.mark.xdist_group("nvflare")
def test_nothing_is_lost_whatever_is_killed_in_a_poc(tmp_path: Path) -> None:
    before = _temporary_folders_of_sites()
    campaign = Campaign(prepare_home(tmp_path / "home"), "poc", seed=50)
    outcome = campaign.run(12, ["three sites"])
    assert outcome.wrong == []
    assert outcome.recovered == outcome.injected == 12
    assert _temporary_folders_of_sites() <= before


def _temporary_folders_of_sites() -> set[Path]:
    """Where NVFlare's server writes what sites log, and leaves the folders behind."""
    return set(Path(tempfile.gettempdir()).glob("*/site-*"))
