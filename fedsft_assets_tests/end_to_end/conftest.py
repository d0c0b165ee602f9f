"""A study's data and base model, made once, and a store of its own for every test."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsft_assets.data.combine import combine
from fedsft_assets.data.sources import fetch
from fedsft_assets.data.splits import split_dataset
from fedsft_assets.federation.job_folder import build_job_folder
from fedsft_assets.settings import PROJECT
from fedsft_assets.specs import PRESETS, JobSpec
from fedsft_assets.store import Store
from fedsft_assets_tests.shipped import DATASETS

TINY = PRESETS["tiny"]


@pytest.fixture(scope="session")
def prepared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the embedded sample's splits and the tiny base model."""
    from fedsft_assets.model.base import create_base_model

    store = Store(tmp_path_factory.mktemp("prepared"))
    for dataset in DATASETS.values():
        fetch(dataset, "sample", into=store.raw(dataset.name), downloads=store.downloads)
        split_dataset(dataset, raw=store.raw(dataset.name), into=store.processed(dataset.name))
    combine([store.processed(name) for name in DATASETS], into=store.combined)
    create_base_model(TINY, into=store.base_model(TINY.name), seed=1234)
    return store.home


@pytest.fixture
def store(prepared_home: Path, tmp_path: Path) -> Store:
    """A copy of the prepared home that a test may do anything with."""
    shutil.copytree(prepared_home, tmp_path / "home")
    return Store(tmp_path / "home")


@pytest.fixture
def build(store: Store) -> Callable[..., str]:
    """Build a shipped job's folder in the test's store, with overrides; gives the job's name."""

    def build_job(job: str, **overrides: float) -> str:
        spec = JobSpec.load(PROJECT / "jobs" / f"{job}.yaml", list(DATASETS))
        build_job_folder(spec.override(**overrides), TINY, store)
        return job

    return build_job
