"""Dagster's and MLflow's own user interfaces over one FEDSFT_HOME, on loopback only."""

import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

from fedsft_assets.federation.processes import MARK, stop_marked
from fedsft_assets.settings import PROJECT, Settings

_HOST = "127.0.0.1"


def serve(settings: Settings) -> None:
    """Start both servers, say where they are, and stop them when this process is told to stop or one of them ends."""
    signal.signal(signal.SIGTERM, _stop)
    mark = f"ui of {settings.home} by {os.getpid()}"
    environment = {**os.environ, MARK: mark}
    servers = []
    try:
        for name, command in _commands(settings).items():
            print(name, flush=True)
            servers.append(subprocess.Popen(command, cwd=PROJECT, env=environment, stdin=subprocess.DEVNULL))
        print("stop both with Ctrl-C", flush=True)
        while all(server.poll() is None for server in servers):
            time.sleep(0.5)
    except KeyboardInterrupt:
        pass
    finally:
        stop_marked(mark)


def _commands(settings: Settings) -> dict[str, list[str]]:
    """A line for the user and the command, for each server."""
    dagster, mlflow = _free_port(3000), _free_port(5000)
    python = sys.executable
    commands = {
        f"Dagster: http://{_HOST}:{dagster}": [
            *(python, "-m", "dagster", "dev", "--host", _HOST, "--port", str(dagster)),
            *("--workspace", str(PROJECT / "workspace.yaml"), "--log-level", "warning"),
        ]
    }
    if settings.mlflow_uri:
        return {**commands, f"MLflow:  {settings.mlflow_uri}": [python, "-c", "import signal; signal.pause()"]}
    store = settings.store
    return {
        **commands,
        f"MLflow:  http://{_HOST}:{mlflow}": [
            *(python, "-m", "mlflow", "server", "--host", _HOST, "--port", str(mlflow), "--workers", "1"),
            *("--backend-store-uri", store.mlflow_uri, "--default-artifact-root", str(store.mlflow_artifacts)),
        ],
    }


def _free_port(preferred: int) -> int:
    """The preferred port if nobody listens there, else any free one."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            try:
                probe.bind((_HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise OSError(f"no free port on {_HOST}")


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
