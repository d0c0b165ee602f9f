"""The user interfaces of Dagster, MLflow and TensorBoard over one FEDSFT_HOME, on loopback only."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

from fedsft_assets.federation.processes import MARK, stop_marked
from fedsft_assets.settings import PROJECT, Settings

_HOST = "127.0.0.1"


@dataclass(frozen=True)
class Server:
    """A user interface: where it is to be found, and the command that serves it."""

    title: str
    url: str
    command: list[str]


def serve(settings: Settings, servers: Sequence[Server]) -> None:
    """Start the servers, say where they are, and stop them when this process is told to stop or one of them ends."""
    # SIGINT too: the background of a script ignores it, and Dagster's processes would then ignore SIGTERM as well.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    mark = f"ui of {settings.home} by {os.getpid()}"
    # MLflow's job workers are for judging answers of agents; nobody asks them anything here.
    environment = {**os.environ, MARK: mark, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    running = []
    try:
        for server in servers:
            print(f"{server.title + ':':12} {server.url}", flush=True)
            running.append(subprocess.Popen(server.command, cwd=PROJECT, env=environment, stdin=subprocess.DEVNULL))
        print("ready in half a minute; stop with Ctrl-C", flush=True)
        while all(process.poll() is None for process in running):
            time.sleep(0.5)
    except KeyboardInterrupt:
        pass
    finally:
        stop_marked(mark)


def study_servers(settings: Settings) -> list[Server]:
    """Dagster, and MLflow unless the user has a tracking server, of which the user is then told."""
    found = [_dagster(_free_port(3000))]
    if settings.mlflow_uri:
        print(f"{'MLflow:':12} {settings.mlflow_uri}", flush=True)
        return found
    return [*found, _mlflow(settings, _free_port(5000))]


def tensorboard_server(settings: Settings) -> Server:
    """TensorBoard over the curves of all jobs."""
    port, folder = _free_port(6006), settings.store.tensorboards
    folder.mkdir(parents=True, exist_ok=True)
    return Server(
        "TensorBoard",
        f"http://{_HOST}:{port}/",
        [
            *(sys.executable, "-m", "tensorboard.main", "--host", _HOST, "--port", str(port)),
            *("--logdir", str(folder), "--window_title", "fedsft"),
        ],
    )


def _dagster(port: int) -> Server:
    return Server(
        "Dagster",
        f"http://{_HOST}:{port}/asset-groups/~all",
        [
            *(sys.executable, "-m", "dagster", "dev", "--host", _HOST, "--port", str(port)),
            *("--workspace", str(PROJECT / "workspace.yaml"), "--log-level", "warning"),
        ],
    )


def _mlflow(settings: Settings, port: int) -> Server:
    """The link opens the curves of all jobs side by side."""
    store = settings.store
    experiment = settings.tracking.experiment_id()
    return Server(
        "MLflow",
        f"http://{_HOST}:{port}/#/experiments/{experiment}/runs?workflowType=machine_learning&compareRunsMode=CHART",
        [
            *(sys.executable, "-m", "mlflow", "server", "--host", _HOST, "--port", str(port), "--workers", "1"),
            *("--backend-store-uri", store.mlflow_uri, "--default-artifact-root", str(store.mlflow_artifacts)),
        ],
    )


def _free_port(preferred: int) -> int:
    """The preferred port if nobody listens there, else any free one."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((_HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise OSError(f"no free port on {_HOST}")


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
