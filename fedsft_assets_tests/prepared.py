"""A study's data and base model, from the embedded sample, and job folders on them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedsft_assets.data.combine import combine
from fedsft_assets.data.sources.fetch import fetch
from fedsft_assets.data.splits import split_dataset
from fedsft_assets.federation.job_folder import build_job_folder
from fedsft_assets.settings import PROJECT
from fedsft_assets.specs.dataset import COMBINED
from fedsft_assets.specs.job import JobSpec
from fedsft_assets.specs.model_preset import PRESETS
from fedsft_assets.store import SPLITS, Store, split_file
from fedsft_assets.versions import adding, current, make_current
from fedsft_assets_tests.shipped import DATASETS

TINY = PRESETS["tiny"]


def prepare_home(home: Path) -> Store:
    """A home with the sample's splits and the tiny base model."""
    from fedsft_assets.model.base_model import create_base_model

    store = Store(home)
    for dataset in DATASETS.values():
        with made_current(store.raw(dataset.name)) as raw:
            fetch(dataset, "sample", into=raw, downloads=store.downloads)
        with made_current(store.processed(dataset.name)) as splits:
            split_dataset(dataset, raw=current(store.raw(dataset.name)), into=splits)
    with made_current(store.combined) as combined:
        combine([current(store.processed(name)) for name in DATASETS], into=combined)
    with made_current(store.base_model(TINY.name)) as base_model:
        create_base_model(TINY, into=base_model / f"{TINY.name}.nemo", seed=1234)
    return store


def small_splits(home: Path) -> Store:
    """A home with splits of one record each, which say where they belong, and no base model."""
    store = Store(home)
    for dataset in (*DATASETS, COMBINED):
        with made_current(store.splits(dataset)) as splits:
            for split in SPLITS:
                split_file(splits, split).write_text(json.dumps({"input": dataset, "output": split}) + "\n")
    return store


def small_home(home: Path) -> Store:
    """A home of which job folders can be built, and nothing trained: small splits, and a text as its base model."""
    store = small_splits(home)
    with made_current(store.base_model(TINY.name)) as base_model:
        (base_model / f"{TINY.name}.nemo").write_text("a base model")
    return store


@contextmanager
def made_current(versions: Path) -> Iterator[Path]:
    """A folder to be filled, which becomes the current version."""
    with adding(versions) as addition:
        yield addition.folder
    make_current(addition.version)


def build_job(store: Store, job: str, **overrides: Any) -> str:
    """Build a shipped job's folder with overrides; gives the job's name."""
    spec = JobSpec.load(PROJECT / "jobs" / f"{job}.yaml", list(DATASETS))
    build_job_folder(spec.override(**overrides), TINY, store)
    return job
