"""A store of its own for each test, MLflow's in a SQLite file or behind a real server."""

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsft_assets.federation.protocol.job_report import MODEL_FILE
from fedsft_assets.store import Store
from fedsft_assets.tracking import EXPERIMENT, Tracking
from fedsft_assets_tests.tracking.examples import REPORT
from fedsft_assets_tests.tracking.server import TrackingServer


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


@pytest.fixture
def tracking(empty_mlflow_database: Path, store: Store) -> Tracking:
    store.home.mkdir(exist_ok=True)
    shutil.copyfile(empty_mlflow_database, store.home / "mlflow.db")
    return Tracking(store.mlflow_uri, store.mlflow_artifacts)


@pytest.fixture
def server(empty_mlflow_database: Path, tmp_path: Path) -> Iterator[TrackingServer]:
    """Not started yet; killed at the end."""
    folder = tmp_path / "server"
    folder.mkdir()
    shutil.copyfile(empty_mlflow_database, folder / "mlflow.db")
    with TrackingServer(folder) as server:
        yield server


@pytest.fixture(scope="module")
def lasting_server(empty_mlflow_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copyfile(empty_mlflow_database, folder / "mlflow.db")
    with TrackingServer(folder) as server:
        server.start()
        yield server


@pytest.fixture
def running_server(lasting_server: TrackingServer) -> Iterator[TrackingServer]:
    """One that a test leaves running, without the experiment and the models of the test before."""
    yield lasting_server
    client = Tracking(lasting_server.url).client()
    if experiment := client.get_experiment_by_name(EXPERIMENT):
        client.rename_experiment(experiment.experiment_id, f"of another test {uuid.uuid4().hex}")
    for model in client.search_registered_models():
        client.delete_registered_model(model.name)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / MODEL_FILE).write_text("weights")
    REPORT.write(folder)
    return folder
