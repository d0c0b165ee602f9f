"""Dagster's servers, each run in the calling process: code server, daemon and webserver.

They connect through the code server's Unix socket, which only this account can open.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CODE = "fedsft_assets.definitions"
"""The code location, as in `workspace.yaml`."""

_SECONDS_TO_LOAD = 180


def serve_code(socket: Path) -> None:
    """Run the code server. Dagster starts another one whenever definitions are reloaded."""
    from dagster._cli.code_server import code_server_cli

    code_server_cli(
        [
            *("start", "--socket", str(socket), "--module-name", CODE, "--location-name", CODE),
            *("--startup-timeout", str(_SECONDS_TO_LOAD), "--log-level", "warning"),
            "--inject-env-vars-from-instance",
        ]
    )


def run_daemon(code_socket: Path, workspace: Path) -> None:
    """Run schedules, sensors and the run queue; `workspace` is the workspace file to write."""
    from dagster._daemon.cli import create_dagster_daemon_cli

    code = {"grpc_server": {"socket": str(code_socket), "location_name": CODE}}
    workspace.write_text(json.dumps({"load_from": [code]}), encoding="utf-8")
    create_dagster_daemon_cli()(["run", "--workspace", str(workspace), "--log-level", "warning"])


@contextmanager
def webserver(code_socket: Path) -> Iterator[Any]:
    """Yield the ASGI application that `dagster-webserver` serves."""
    from dagster import DagsterInstance
    from dagster._core.workspace.context import WorkspaceProcessContext
    from dagster._core.workspace.load_target import GrpcServerTarget
    from dagster._utils.log import configure_loggers
    from dagster_webserver.app import create_app_from_workspace_process_context
    from dagster_webserver.cli import DEFAULT_DB_STATEMENT_TIMEOUT, DEFAULT_POOL_MAX_OVERFLOW, DEFAULT_POOL_RECYCLE
    from dagster_webserver.version import __version__

    configure_loggers(log_level="WARNING")
    code = GrpcServerTarget(host="localhost", port=None, socket=str(code_socket), location_name=CODE)
    with DagsterInstance.get() as instance:
        instance.optimize_for_webserver(DEFAULT_DB_STATEMENT_TIMEOUT, DEFAULT_POOL_RECYCLE, DEFAULT_POOL_MAX_OVERFLOW)
        with WorkspaceProcessContext(instance, workspace_load_target=code, version=__version__) as context:
            yield create_app_from_workspace_process_context(context, live_data_poll_rate=2000)
