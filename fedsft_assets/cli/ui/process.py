"""The processes of the user interfaces, one for each command here: nobody but `start` starts them.

What a process has to know that nobody else may is in a pipe, its standard input: command lines are for all to read.
What listens on loopback is behind `guard`, and sockets that are files are in a folder of this account's.
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

_SECONDS_TO_ANSWER = 3  # what is being answered when a server is told to stop
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Start:
    """`listener` is the number of the open socket to serve on, `folder` the place for sockets that are files."""

    token: str
    listener: int | None
    folder: str

    def pipe(self) -> int:
        """A file descriptor from which a process may read this once."""
        reading, writing = os.pipe()
        os.write(writing, json.dumps(asdict(self)).encode())
        os.close(writing)
        return reading

    @classmethod
    def read(cls) -> "Start":
        """What this process was started with. Those that it starts get none of it."""
        start = cls(**json.load(sys.stdin))
        if start.listener is not None:
            os.set_inheritable(start.listener, False)
        return start

    def socket(self) -> socket.socket:
        """What this process serves on."""
        if self.listener is None:
            raise ValueError("a server of pages is started with a socket to listen on")
        return socket.socket(fileno=os.dup(self.listener))

    @property
    def code(self) -> Path:
        """Where Dagster's code server listens."""
        return Path(self.folder, "code")


def main() -> None:
    """Serve until this process is told to stop."""
    parser = argparse.ArgumentParser(prog="fedsft_assets.cli.ui.process", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("code", "daemon", "dagster"):
        commands.add_parser(name)
    mlflow = commands.add_parser("mlflow")
    mlflow.add_argument("--backend-store-uri", required=True)
    mlflow.add_argument("--default-artifact-root", required=True)
    commands.add_parser("tensorboard").add_argument("--logdir", required=True)
    args = parser.parse_args()
    run = {"code": _code, "daemon": _daemon, "dagster": _dagster, "mlflow": _mlflow, "tensorboard": _tensorboard}
    # MLflow imports that too; nothing that is installed takes its place.
    warnings.filterwarnings("ignore", message="starlette.middleware.wsgi is deprecated")
    with suppress(KeyboardInterrupt):
        run[args.command](args, Start.read())


def _code(_: argparse.Namespace, start: Start) -> None:
    """Dagster's server of definitions and runs."""
    tempfile.tempdir = start.folder  # where Dagster starts another one; runs have the usual place for temporary files
    serve_code(start.code)


def _daemon(_: argparse.Namespace, start: Start) -> None:
    """Dagster's schedules, sensors and queue of runs."""
    _wait_for(start.code)
    run_daemon(start.code, Path(start.folder, "workspace.yaml"))


def _dagster(_: argparse.Namespace, start: Start) -> None:
    """Dagster's pages."""
    _wait_for(start.code)
    with webserver(start.code) as app:
        _serve(app, start)


def _mlflow(args: argparse.Namespace, start: Start) -> None:
    """MLflow's pages, as `mlflow server` makes them: in the environment that it gives its own processes."""
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
    """TensorBoard's pages. Its faster reader of files would listen on a port of its own, where nothing guards it."""
    from starlette.middleware.wsgi import WSGIMiddleware
    from tensorboard import program

    class Guarded(program.TensorBoardServer):
        def __init__(self, wsgi_app: Any, _: argparse.Namespace) -> None:
            self._app = WSGIMiddleware(wsgi_app)

        def serve_forever(self) -> None:
            _serve(self._app, start)

        def print_serving_message(self) -> None:
            pass  # whoever started this process has said it

        def get_url(self) -> str:
            return f"http://127.0.0.1:{start.socket().getsockname()[1]}/"

    tempfile.tempdir = start.folder  # where it writes down that it runs
    board = program.TensorBoard(server_class=Guarded)
    board.configure(logdir=args.logdir, window_title="fedsft", load_fast="false")
    board.main()


def _serve(app: Any, start: Start) -> None:
    """Until SIGINT or SIGTERM. Nothing that was asked is written down: links have the token in them."""
    import uvicorn

    listener = start.socket()
    config = uvicorn.Config(
        guarded(app, start.token, listener.getsockname()[1]),
        log_level=logging.WARNING,
        access_log=False,
        proxy_headers=False,  # who asks is who is connected, whatever is said
        timeout_graceful_shutdown=_SECONDS_TO_ANSWER,
    )
    uvicorn.Server(config).run(sockets=[listener])


def _wait_for(server: Path) -> None:
    """Until somebody listens there. If nobody ever does, whoever started this process ends it."""
    while True:
        with socket.socket(socket.AF_UNIX) as asking, suppress(OSError):
            asking.connect(str(server))
            return
        time.sleep(_POLL_SECONDS)


if __name__ == "__main__":
    main()
