"""The processes of the user interfaces, one for each command here: nobody but `ui.py` starts them.

What a process has to know that nobody else may is in a pipe, its standard input: command lines are for all to read.
What listens on loopback is behind `ui_guard`, and sockets that are files are in a folder of this account's.
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

from fedsft_assets.ui.guard import guarded

CODE = "fedsft_assets.definitions"
"""The code location, as `workspace.yaml` has it."""

_SECONDS_TO_LOAD = 180
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
    parser = argparse.ArgumentParser(prog="fedsft_assets.ui.process", description=__doc__)
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
    """Dagster's server of definitions and runs. It starts another one anew whenever definitions are reloaded."""
    from dagster._cli.code_server import code_server_cli

    tempfile.tempdir = start.folder  # the other one listens there; runs have the usual place for temporary files
    code_server_cli(
        [
            *("start", "--socket", str(start.code), "--module-name", CODE, "--location-name", CODE),
            *("--startup-timeout", str(_SECONDS_TO_LOAD), "--log-level", "warning"),
            "--inject-env-vars-from-instance",
        ]
    )


def _daemon(_: argparse.Namespace, start: Start) -> None:
    """Dagster's schedules, sensors and queue of runs."""
    from dagster._daemon.cli import create_dagster_daemon_cli

    _wait_for(start.code)
    workspace = Path(start.folder, "workspace.yaml")
    code = {"grpc_server": {"socket": str(start.code), "location_name": CODE}}
    workspace.write_text(json.dumps({"load_from": [code]}), encoding="utf-8")
    create_dagster_daemon_cli()(["run", "--workspace", str(workspace), "--log-level", "warning"])


def _dagster(_: argparse.Namespace, start: Start) -> None:
    """Dagster's pages, as `dagster-webserver` makes them."""
    from dagster import DagsterInstance
    from dagster._core.workspace.context import WorkspaceProcessContext
    from dagster._core.workspace.load_target import GrpcServerTarget
    from dagster._utils.log import configure_loggers
    from dagster_webserver.app import create_app_from_workspace_process_context
    from dagster_webserver.cli import DEFAULT_DB_STATEMENT_TIMEOUT, DEFAULT_POOL_MAX_OVERFLOW, DEFAULT_POOL_RECYCLE
    from dagster_webserver.version import __version__

    configure_loggers(log_level="WARNING")
    _wait_for(start.code)
    code = GrpcServerTarget(host="localhost", port=None, socket=str(start.code), location_name=CODE)
    with DagsterInstance.get() as instance:
        instance.optimize_for_webserver(DEFAULT_DB_STATEMENT_TIMEOUT, DEFAULT_POOL_RECYCLE, DEFAULT_POOL_MAX_OVERFLOW)
        with WorkspaceProcessContext(instance, workspace_load_target=code, version=__version__) as context:
            _serve(create_app_from_workspace_process_context(context, live_data_poll_rate=2000), start)


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
