"""The user interfaces: on this machine only, over one home, on ports that are free."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from pathlib import Path

import psutil
import pytest

from fedsft_assets.settings import Settings
from fedsft_assets.store import Store
from fedsft_assets.tracking import EXPERIMENT, Tracking
from fedsft_assets.tracking.tensorboard import EventFiles
from fedsft_assets.ui import _free_port, study_servers, tensorboard_server
from fedsft_assets_tests.tracking.examples import job_points, until


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


def test_servers_hear_signals_also_in_the_background_of_a_script(tmp_path: Path) -> None:
    """There SIGINT is ignored, and Dagster gives SIGTERM the handler that SIGINT had."""
    heard = tmp_path / "heard"
    server = f"import signal; print(signal.getsignal(signal.SIGINT), file=open({str(heard)!r}, 'w'))"
    serving = f"""
import sys
from fedsft_assets.settings import Settings
from fedsft_assets.ui import Server, serve
serve(Settings(), [Server("a server", "nowhere", [sys.executable, "-c", {server!r}])])
"""
    subprocess.run(
        [sys.executable, "-c", serving],
        env={**os.environ, "FEDSFT_HOME": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        check=True,
    )
    assert "default_int_handler" in heard.read_text()


@pytest.mark.slow
def test_tensorboard_shows_each_execution_anew_and_ends_with_its_command(tmp_path: Path) -> None:
    """As `make tensorboard` starts it, asked over HTTP. An execution takes the place of the one before."""
    folder, points = Store(tmp_path).tensorboard("fedavg"), job_points()
    EventFiles(folder).complete(job_points(rounds=5))
    environment = {**os.environ, "FEDSFT_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "fedsft_assets.cli", "tensorboard"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as ui:
        try:
            assert ui.stdout is not None
            url = ui.stdout.readline().split()[-1]
            assert url.startswith("http://127.0.0.1:")
            until(lambda: _curve(url, 6), "six values of the first execution")
            EventFiles(folder).complete(points)
            until(lambda: _curve(url, 3), "three values of the second execution, and no other")
            assert [(step, value) for _, step, value in _curve(url, 3)] == [(0, 7.0), (64, 2.0), (128, 2.5)]
            processes = psutil.Process(ui.pid).children(recursive=True)
            sockets = [connection for process in processes for connection in process.net_connections()]
            listening = {socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN}
            assert listening
            assert listening <= {"127.0.0.1", "::1"}
        finally:
            ui.terminate()
    psutil.wait_procs(processes, timeout=30)
    assert [process for process in processes if process.is_running()] == []


def _curve(url: str, length: int) -> list[list[float]]:
    """The job's val_loss as TensorBoard has it, if that is the only execution and so long; else nothing."""
    try:
        with urllib.request.urlopen(f"{url}data/plugin/scalars/tags", timeout=20) as answer:
            runs = [run for run in json.load(answer) if not run.endswith(("site-1", "site-2"))]
        if len(runs) != 1:
            return []
        query = urllib.parse.urlencode({"run": runs[0], "tag": "val_loss"})
        with urllib.request.urlopen(f"{url}data/plugin/scalars/scalars?{query}", timeout=20) as answer:
            curve: list[list[float]] = json.load(answer)
            return curve if len(curve) == length else []
    except OSError:
        return []
