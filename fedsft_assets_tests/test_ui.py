"""The user interfaces: on this machine only, over one home, on ports that are free."""

import shutil
import socket
from pathlib import Path

import pytest

from fedsft_assets.settings import Settings
from fedsft_assets.tracking import EXPERIMENT, Tracking
from fedsft_assets.ui import _free_port, study_servers, tensorboard_server


@pytest.fixture
def settings(tmp_path: Path, empty_mlflow_database: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copyfile(empty_mlflow_database, tmp_path / "mlflow.db")
    return Settings(home=tmp_path)


def _unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_preferred_port_is_taken_when_it_is_free() -> None:
    port = _unused_port()
    assert _free_port(port) == port


def test_another_port_is_taken_when_somebody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        other = _free_port(port)
        assert other != port
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", other))


def test_both_servers_listen_on_loopback_only_where_the_user_is_told(settings: Settings) -> None:
    both = study_servers(settings)
    assert [server.title for server in both] == ["Dagster", "MLflow"]
    for server in both:
        options = dict(zip(server.command, server.command[1:], strict=False))
        assert options["--host"] == "127.0.0.1"
        assert server.url.startswith(f"http://127.0.0.1:{options['--port']}/")
        assert "0.0.0.0" not in " ".join(server.command)


def test_mlflow_shows_the_jobs_of_this_home(settings: Settings) -> None:
    *_, mlflow = study_servers(settings)
    options = dict(zip(mlflow.command, mlflow.command[1:], strict=False))
    assert options["--backend-store-uri"] == settings.store.mlflow_uri
    assert options["--default-artifact-root"] == str(settings.store.mlflow_artifacts)
    experiment = Tracking(settings.store.mlflow_uri).client().get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    assert f"/#/experiments/{experiment.experiment_id}/runs" in mlflow.url


def test_no_mlflow_is_started_beside_a_tracking_server_of_the_users(settings: Settings) -> None:
    theirs = settings.model_copy(update={"mlflow_uri": "http://tracking:5000"})
    assert [server.title for server in study_servers(theirs)] == ["Dagster"]


def test_tensorboard_serves_the_curves_of_this_home_on_loopback_only(settings: Settings) -> None:
    server = tensorboard_server(settings)
    options = dict(zip(server.command, server.command[1:], strict=False))
    assert options["--logdir"] == str(settings.home / "tensorboard")
    assert options["--host"] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{options['--port']}/"
