"""A study's data and base model, made once, and a store of its own for every test."""

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from fedsft_assets.federation.runtimes.processes import stop_marked
from fedsft_assets.store import Store
from fedsft_assets_tests.prepared import build_job, prepare_home


@pytest.fixture(scope="session")
def prepared_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with the embedded sample's splits and the tiny base model."""
    return prepare_home(tmp_path_factory.mktemp("prepared")).home


@pytest.fixture
def store(prepared_home: Path, tmp_path: Path) -> Store:
    """A copy of the prepared home that a test may do anything with."""
    shutil.copytree(prepared_home, tmp_path / "home", symlinks=True)
    return Store(tmp_path / "home")


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[str]:
    """What all processes of a test carry; none is left at its end."""
    mark = f"test {tmp_path}"
    yield mark
    stop_marked(mark)


@pytest.fixture
def build(store: Store) -> Callable[..., str]:
    """Build a shipped job's folder in the test's store, with overrides; gives the job's name."""
    return partial(build_job, store)
