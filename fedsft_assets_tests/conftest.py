"""What tests of several parts start from."""

import os
import signal
from pathlib import Path

import pytest

from fedsft_assets.data.sources.sample import write_sample
from fedsft_assets.settings import PROJECT
from fedsft_assets.tracking import Tracking
from fedsft_assets_tests.shipped import DATASETS

_REAL_SAMPLES = PROJECT.parent / "shared/data/real_samples"


def pytest_configure(config: pytest.Config) -> None:
    """Hear SIGINT also in the background of a script, where Dagster's processes would otherwise ignore SIGTERM too.

    The user's home may be for other data or jobs, which tests that do not make one of their own would work on.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):  # workers of pytest-xdist get it from the process that starts them
        own = os.environ.get("FEDSFT_HOME") or PROJECT / ".fedsft"
        os.environ["FEDSFT_HOME"] = str(Path(own) / "tests")


@pytest.fixture(scope="session")
def real_samples() -> Path:
    if not _REAL_SAMPLES.is_dir():
        pytest.skip(f"no real rows: {_REAL_SAMPLES} is not on this machine")
    return _REAL_SAMPLES


@pytest.fixture(scope="session")
def empty_mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new MLflow store, made once: making its tables takes seconds, copying the file does not."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    Tracking(f"sqlite:///{path}").client().search_experiments()
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The embedded sample as a folder of the user's, which can change."""
    for dataset in DATASETS.values():
        write_sample(dataset.name, tmp_path / "data" / dataset.folder)
    return tmp_path / "data"
