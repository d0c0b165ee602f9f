"""The processes of the web interfaces, one per command here, started by `start` only.

Secrets are passed through a pipe on standard input, since command lines are public. Servers on loopback are behind
`guard`, and Unix sockets are in a private folder.
"""

import argparse
import json
import logging
import os
import socket
import sys
import tempfile
import time
import uuid
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedsft_assets.cli.ui.guard import guarded
from fedsft_assets.defs.servers import run_daemon, serve_code, webserver

_SECONDS_TO_ANSWER = 3  # for pending requests when a server stops
_SECONDS_OF_ANSWERS = 3600
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Start:
    """`listener` is the file descriptor of the socket to serve on, `folder` a private folder for Unix sockets."""

    token: str
    listener: int | None
    folder: str

    def pipe(self) -> int:
        """A file descriptor from which a process can read this once."""
        reading, writing = os.pipe()
        os.write(writing, json.dumps(asdict(self)).encode())
        os.close(writing)
        return reading

    @classmethod
    def read(cls) -> "Start":
        """What this process was started with; its child processes inherit none of it."""
        start = cls(**json.load(sys.stdin))
        if start.listener is not None:
            os.set_inheritable(start.listener, False)
        return start

    def socket(self) -> socket.socket:
        """The socket to serve on."""
        if self.listener is None:
            raise ValueError("no socket to listen on was passed to this server")
        return socket.socket(fileno=os.dup(self.listener))

    @property
    def code(self) -> Path:
        """The socket of Dagster's code server."""
        return Path(self.folder, "code")


def main() -> None:
    """Serve until this process is stopped."""
    parser = argparse.ArgumentParser(prog="fedsft_assets.cli.ui.process", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("code", "daemon", "dagster"):
        commands.add_parser(name)
    mlflow = commands.add_parser("mlflow")
    mlflow.add_argument("--backend-store-uri", required=True)
    mlflow.add_argument("--default-artifact-root", required=True)
    commands.add_parser("tensorboard").add_argument("--logdir", required=True)
    commands.add_parser("model").add_argument("folder")
    args = parser.parse_args()
    run = {
        "code": _code,
        "daemon": _daemon,
        "dagster": _dagster,
        "mlflow": _mlflow,
        "tensorboard": _tensorboard,
        "model": _model,
    }
    # MLflow imports it too; no installed package replaces it.
    warnings.filterwarnings("ignore", message="starlette.middleware.wsgi is deprecated")
    with suppress(KeyboardInterrupt):
        run[args.command](args, Start.read())


def _code(_: argparse.Namespace, start: Start) -> None:
    """Dagster's code server."""
    tempfile.tempdir = start.folder  # for Dagster's further code servers; runs use the default folder
    serve_code(start.code)


def _daemon(_: argparse.Namespace, start: Start) -> None:
    """Dagster's daemon: schedules, sensors and the run queue."""
    _wait_for(start.code)
    run_daemon(start.code, Path(start.folder, "workspace.yaml"))


def _dagster(_: argparse.Namespace, start: Start) -> None:
    """Dagster's webserver."""
    _wait_for(start.code)
    with webserver(start.code) as app:
        _serve(app, start)


def _mlflow(args: argparse.Namespace, start: Start) -> None:
    """MLflow's web interface, with the environment that `mlflow server` sets for its own processes."""
    from mlflow.environment_variables import _MLFLOW_IN_JOB_EXECUTOR, _MLFLOW_SERVER_BOOT_ID, _MLFLOW_SGI_NAME
    from mlflow.server import constants

    os.environ.update(
        {
            constants.BACKEND_STORE_URI_ENV_VAR: args.backend_store_uri,
            constants.REGISTRY_STORE_URI_ENV_VAR: args.backend_store_uri,
            constants.ARTIFACT_ROOT_ENV_VAR: args.default_artifact_root,
            constants.SERVE_ARTIFACTS_ENV_VAR: "true",
            constants.ARTIFACTS_DESTINATION_ENV_VAR: args.default_artifact_root,
            _MLFLOW_SERVER_BOOT_ID.name: uuid.uuid4().hex,
            _MLFLOW_IN_JOB_EXECUTOR.name: "false",
            _MLFLOW_SGI_NAME.name: "uvicorn",
        }
    )
    from mlflow.server.fastapi_app import app
    from mlflow.server.handlers import initialize_backend_stores

    initialize_backend_stores(args.backend_store_uri, args.backend_store_uri, args.default_artifact_root)
    _serve(app, start)


def _tensorboard(args: argparse.Namespace, start: Start) -> None:
    """TensorBoard's web interface. Its fast loader is off: it would listen on a port of its own, unguarded."""
    from starlette.middleware.wsgi import WSGIMiddleware
    from tensorboard import program

    class Guarded(program.TensorBoardServer):
        def __init__(self, wsgi_app: Any, _: argparse.Namespace) -> None:
            self._app = WSGIMiddleware(wsgi_app)

        def serve_forever(self) -> None:
            _serve(self._app, start)

        def print_serving_message(self) -> None:
            pass  # the parent process has printed it

        def get_url(self) -> str:
            return f"http://127.0.0.1:{start.socket().getsockname()[1]}/"

    tempfile.tempdir = start.folder  # for TensorBoard's process record
    board = program.TensorBoard(server_class=Guarded)
    board.configure(logdir=args.logdir, window_title="fedsft", load_fast="false")
    board.main()


def _model(args: argparse.Namespace, start: Start) -> None:
    """A model of MLflow's, with the interface of `mlflow models serve`."""
    from mlflow.environment_variables import MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT
    from mlflow.pyfunc import load_model, scoring_server

    if not MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT.is_set():  # long answers, and others before them, take their time
        MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT.set(_SECONDS_OF_ANSWERS)
    _serve(scoring_server.init(load_model(args.folder)), start)


def _serve(app: Any, start: Start) -> None:
    """Serve until SIGINT or SIGTERM. No access log is kept: links contain the token."""
    import uvicorn

    listener = start.socket()
    config = uvicorn.Config(
        guarded(app, start.token, listener.getsockname()[1]),
        log_level=logging.WARNING,
        access_log=False,
        proxy_headers=False,  # ignore client addresses claimed in headers
        timeout_graceful_shutdown=_SECONDS_TO_ANSWER,
    )
    uvicorn.Server(config).run(sockets=[listener])


def _wait_for(server: Path) -> None:
    """Wait until a process listens there. If none ever does, the parent ends this process."""
    while True:
        with socket.socket(socket.AF_UNIX) as asking, suppress(OSError):
            asking.connect(str(server))
            return
        time.sleep(_POLL_SECONDS)


if __name__ == "__main__":
    main()
