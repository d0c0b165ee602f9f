"""The asset `job_folder/<job>`: what it says of a job that cannot be built, and of its noise."""

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from fedsft_assets.defs.assets.job_folder import job_folder_asset
from fedsft_assets.defs.resources import resources
from fedsft_assets.model.base_model import create_base_model
from fedsft_assets.settings import PROJECT, Settings
from fedsft_assets.specs.job import FiltersSpec, JobSpec, PrivacySpec
from fedsft_assets.specs.model_preset import PRESETS
from fedsft_assets.store import Store
from fedsft_assets.versions import current
from fedsft_assets_tests.prepared import made_current, small_splits
from fedsft_assets_tests.shipped import DATASETS


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = small_splits(tmp_path / "home")
    with made_current(store.base_model("tiny")) as base_model:
        create_base_model(PRESETS["tiny"], base_model / "tiny.nemo", 7, ["a text", "and another one"])
    return store


class _Current(dg.IOManager):
    """What an upstream asset has made is what is current in the store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def handle_output(self, context: dg.OutputContext, obj: Any) -> None:
        pass

    def load_input(self, context: dg.InputContext) -> Path:
        name = context.asset_key.path[-1]
        return current(self._store.base_model("tiny") if name == "base_model" else self._store.splits(name))


def _materialize(store: Store, **privacy: Any) -> dg.ExecuteInProcessResult:
    spec = JobSpec.load(PROJECT / "jobs" / "fedavg.yaml", list(DATASETS))
    filters = FiltersSpec(privacy=PrivacySpec(clip=1.0, **privacy))
    asset = job_folder_asset(spec.model_copy(update={"filters": filters}))
    upstream = [dg.AssetSpec(key) for key in asset.dependency_keys]
    given = {**resources(Settings(home=store.home, model="tiny")), "io_manager": _Current(store)}
    return dg.materialize([asset, *upstream], resources=given, selection=[asset], raise_on_error=False)


def test_noise_under_which_nothing_can_be_learned_fails_the_asset_with_what_to_do(store: Store) -> None:
    result = _materialize(store, noise_multiplier=1.0)
    assert not result.success
    failure = result.failure_data_for_node("job_folder__fedavg")
    assert failure is not None
    assert failure.error is not None
    assert "Failure" in failure.error.message
    assert "jobs/fedavg.yaml: filters.privacy.noise_multiplier: 1: nothing can be learned" in failure.error.message


def test_noise_is_shown_in_clips(store: Store) -> None:
    result = _materialize(store, noise_multiplier=0.001)
    assert result.success
    (event,) = result.asset_materializations_for_node("job_folder__fedavg")
    assert event.metadata["noise in a round, in clips"].value == pytest.approx(0.6, abs=0.1)
