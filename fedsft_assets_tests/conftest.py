"""A new MLflow store, made once: making its tables takes seconds, copying the file does not."""

from pathlib import Path

import pytest

from fedsft_assets.tracking import Tracking


@pytest.fixture(scope="session")
def empty_mlflow_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    Tracking(f"sqlite:///{path}").client().search_experiments()
    return path
