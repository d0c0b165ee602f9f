"""A study's data and base model, from the embedded sample, and job folders on them."""

from pathlib import Path
from typing import Any

from fedsft_assets.data.combine import combine
from fedsft_assets.data.sources import fetch
from fedsft_assets.data.splits import split_dataset
from fedsft_assets.federation.job_folder import build_job_folder
from fedsft_assets.settings import PROJECT
from fedsft_assets.specs import PRESETS, JobSpec
from fedsft_assets.store import Store
from fedsft_assets_tests.shipped import DATASETS

TINY = PRESETS["tiny"]


def prepare_home(home: Path) -> Store:
    """A home with the sample's splits and the tiny base model."""
    from fedsft_assets.model.base import create_base_model

    store = Store(home)
    for dataset in DATASETS.values():
        fetch(dataset, "sample", into=store.raw(dataset.name), downloads=store.downloads)
        split_dataset(dataset, raw=store.raw(dataset.name), into=store.processed(dataset.name))
    combine([store.processed(name) for name in DATASETS], into=store.combined)
    create_base_model(TINY, into=store.base_model(TINY.name), seed=1234)
    return store


def build_job(store: Store, job: str, **overrides: Any) -> str:
    """Build a shipped job's folder with overrides; gives the job's name."""
    spec = JobSpec.load(PROJECT / "jobs" / f"{job}.yaml", list(DATASETS))
    build_job_folder(spec.override(**overrides), TINY, store)
    return job
