"""Kills, freezes, stops and absences at random moments, in the simulator, a POC and a provisioned federation."""

import tempfile
from pathlib import Path

import pytest

from fedsft_assets_tests.faults.campaign import Campaign, build_variant
from fedsft_assets_tests.faults.comparison import Result, differences, with_same_participation
from fedsft_assets_tests.faults.outcome import Outcome, Verdict
from fedsft_assets_tests.faults.systems import SimulatorSystem
from fedsft_assets_tests.prepared import prepare_home

pytestmark = pytest.mark.slow


def _is_good(outcome: Outcome, faults: int) -> bool:
    """Whether so many were injected, and each execution ended as without them, or said first what to do."""
    good = outcome.count(Verdict.RECOVERED) + outcome.count(Verdict.REFUSED)
    return (outcome.wrong, outcome.injected.total(), good) == ([], faults, faults)


def test_nothing_is_lost_whatever_befalls_the_simulator(tmp_path: Path) -> None:
    store = prepare_home(tmp_path / "home")
    outcome = Campaign(store, "simulator", seed=1334, variant="bf16 differences").run(8)
    assert _is_good(outcome, 8), outcome
    # What the campaign compares with where sites may miss rounds is, where none does, what the simulator gives.
    job = build_variant(store, "bf16 differences")
    folder = store.home / "reference" / "bf16 differences"
    simulated = Result.of_execution(folder / "workspace", folder / "checkpoint")
    computed = with_same_participation(store, job, {}, SimulatorSystem.trainer_threads, tmp_path / "computed")
    assert differences(computed, simulated) == []


def test_nothing_is_lost_whatever_befalls_a_poc(tmp_path: Path) -> None:
    store = prepare_home(tmp_path / "home")
    outcome = Campaign(store, "poc", seed=2212, variant="three sites").run(6)
    assert _is_good(outcome, 6), outcome
    jobs = {folder.name for folder in (store.home / "poc" / "jobs").iterdir()}
    assert jobs
    assert [path for path in Path(tempfile.gettempdir()).iterdir() if path.name in jobs] == []


@pytest.mark.long
def test_nothing_is_lost_whatever_befalls_a_federation(tmp_path: Path) -> None:
    outcome = Campaign(prepare_home(tmp_path / "home"), "production", seed=1115, variant="two of three suffice").run(8)
    assert _is_good(outcome, 8), outcome
