"""Which runtime runs a job, and with how many threads."""

from pathlib import Path
from typing import Any

import pytest

from fedsft_assets.federation.job_folder import JobFolder
from fedsft_assets.federation.runtimes import choose
from fedsft_assets.federation.runtimes.simulator import runtime as simulator
from fedsft_assets.specs.model_preset import PRESETS
from fedsft_assets.specs.runtime import RuntimeSettings
from fedsft_assets.store import Store
from fedsft_assets.versions import current
from fedsft_assets_tests.prepared import build_job, small_home


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return small_home(tmp_path / "home")


def _threads(store: Store, monkeypatch: pytest.MonkeyPatch, job: str, cores: int, **settings: Any) -> int:
    """Threads of each trainer of a shipped job, on a machine with so many cores."""
    build_job(store, job)
    folder = JobFolder.read(current(store.job_folder(job)))
    given: list[int] = []
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    monkeypatch.setattr(simulator, "Simulator", lambda _, threads, __: given.append(threads))
    choose.make_runtime(RuntimeSettings(**settings), folder, store.home)
    return given[0]


@pytest.mark.parametrize("cores", [1, 2, 64])
def test_tiny_model_has_the_same_threads_on_every_machine(
    store: Store, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    assert PRESETS["tiny"].simulator_threads == 2
    assert _threads(store, monkeypatch, "combined", cores) == 2
    assert _threads(store, monkeypatch, "fedavg", cores) == 1


def test_launchpad_decides_over_the_preset(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _threads(store, monkeypatch, "combined", cores=8, threads_per_trainer=5) == 5
