"""Starts web interfaces and models for one FEDSFT_HOME: Dagster, MLflow, TensorBoard; on loopback, behind a token."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from urllib.parse import quote

from fedsft_assets.cli.ui.process import Start
from fedsft_assets.cli.ui.token import link, new_token, read_token
from fedsft_assets.federation.runtimes.processes import MARK, stop_marked
from fedsft_assets.process_env import DAGSTER_PAGES, MLFLOW_PAGES, child_environment
from fedsft_assets.settings import PROJECT, Settings
from fedsft_assets.tracking import Tracking

_HOST = "127.0.0.1"
ASSET_GROUPS = ("raw", "processed", "combined", "model", "job_folders", "checkpoints", "evaluations", "comparison")


@dataclass(frozen=True)
class Server:
    """A process of a web interface: its command, and its URL if it serves pages.

    It serves its pages on `listener`, which already listens, so that no other process can take the port. Only a process
    that runs studies gets the secrets in the user's environment. `request` is the body of a request to `url`, for a
    server that is asked by programs instead of a browser.
    """

    title: str
    url: str | None
    command: list[str]
    needs_secrets: bool = False
    listener: socket.socket | None = None
    request: str | None = None


def serve(settings: Settings, servers: Sequence[Server]) -> None:
    """Start the servers, print their links, and stop them when this process is stopped or one of them ends.

    Raises TokenFileError.
    """
    # SIGINT too: background jobs of scripts ignore it, and Dagster's processes would then ignore SIGTERM as well.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    token = read_token(settings.ui_token_file) if settings.ui_token_file else new_token()
    mark = f"ui of {settings.home} by {os.getpid()}"
    running: list[subprocess.Popen[bytes]] = []
    pages = _pages(servers)
    # Private, unlike its parent folder, where other accounts could listen first.
    with tempfile.TemporaryDirectory(prefix="fedsft-", ignore_cleanup_errors=True) as folder:
        try:
            for server in servers:
                if server.request:
                    print(_curl(server, token, settings.ui_token_file), flush=True)
                elif server.url:
                    shown = server.url if settings.ui_token_file else link(server.url, token)
                    print(f"{server.title + ':':12} {shown}", flush=True)
                running.append(_start(server, token, folder, {MARK: mark, **pages}))
            if settings.ui_token_file and not any(server.request for server in servers):
                print(f"append ?token=… with the token in {settings.ui_token_file}", flush=True)
            print("ready in half a minute; stop with Ctrl-C", flush=True)
            while all(process.poll() is None for process in running):
                time.sleep(0.5)
        except KeyboardInterrupt:
            pass
        finally:
            stop_marked(mark)


def _curl(server: Server, token: str, token_file: Path | None) -> str:
    """A command for bash that sends the server's request. The token is not among curl's arguments, which are public."""
    header = f"Authorization: Bearer {f'$(cat {shlex.quote(str(token_file))})' if token_file else token}"
    return (
        f"curl -s {server.url} -H 'Content-Type: application/json' -H @- -d {shlex.quote(str(server.request))}"
        f' <<< "{header}"'
    )


def _pages(servers: Sequence[Server]) -> dict[str, str]:
    """The variables with the addresses of Dagster's and MLflow's pages."""
    names = {"Dagster": DAGSTER_PAGES, "MLflow": MLFLOW_PAGES}
    shown = [server for server in servers if server.title in names and server.listener]
    return {names[server.title]: _address(server.listener) for server in shown if server.listener}


def _start(server: Server, token: str, folder: str, variables: dict[str, str]) -> "subprocess.Popen[bytes]":
    # MLflow's job workers are for evaluating agents, which is not used here.
    own = {**variables, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    environment = {**(os.environ if server.needs_secrets else child_environment()), **own}
    listener = server.listener.fileno() if server.listener else None
    start = Start(token, listener, folder).pipe()
    try:
        inherited = [] if listener is None else [listener]
        return subprocess.Popen(server.command, cwd=PROJECT, env=environment, stdin=start, pass_fds=inherited)
    finally:
        os.close(start)
        if server.listener:
            server.listener.close()


def study_servers(settings: Settings) -> list[Server]:
    """Dagster, and MLflow unless the user has a tracking server, whose address is printed instead."""
    found = _dagster(listen(3000))
    if settings.mlflow_uri:
        print(f"{'MLflow:':12} {settings.mlflow_uri}", flush=True)
        return found
    return [*found, _mlflow(settings, listen(5000))]


def tensorboard_server(settings: Settings) -> Server:
    """TensorBoard for the curves of all jobs."""
    listener, folder = listen(6006), settings.store.tensorboards
    folder.mkdir(parents=True, exist_ok=True)
    command = _command("tensorboard", "--logdir", str(folder))
    return Server("TensorBoard", f"{_address(listener)}/", command, listener=listener)


def model_server(folder: Path, listener: socket.socket | None, preferred: int, request: str) -> Server:
    """The model in this folder, on the listener or the preferred port if it is free."""
    listener = listener or listen(preferred)
    return Server(
        "model", f"{_address(listener)}/invocations", _command("model", str(folder)), listener=listener, request=request
    )


def _dagster(listener: socket.socket) -> list[Server]:
    """Dagster's three processes, as in `dagster dev`: webserver, code server and daemon.

    The link opens the graph with all groups of assets expanded.
    """
    expanded = quote(",".join(f"global@global:{group}" for group in ASSET_GROUPS))
    url = f"{_address(listener)}/asset-groups/~all?expanded={expanded}"
    return [
        Server("Dagster", url, _command("dagster"), needs_secrets=True, listener=listener),
        *(Server(f"Dagster's {name}", None, _command(name), needs_secrets=True) for name in ("code", "daemon")),
    ]


def _mlflow(settings: Settings, listener: socket.socket) -> Server:
    """MLflow; the link opens the curves of all jobs side by side."""
    store = settings.store
    experiment = Tracking.of(settings).experiment_id()
    return Server(
        "MLflow",
        f"{_address(listener)}/#/experiments/{experiment}/runs?workflowType=machine_learning&compareRunsMode=CHART",
        _command(
            *("mlflow", "--backend-store-uri", store.mlflow_uri),
            *("--default-artifact-root", str(store.mlflow_artifacts)),
        ),
        listener=listener,
    )


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "fedsft_assets.cli.ui.process", *words]


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()
    return f"http://{host}:{port}"


def listen(preferred: int) -> socket.socket:
    """A listening socket on the preferred port if it is free, otherwise on any free port."""
    for port in (preferred, 0):
        try:
            return socket.create_server((_HOST, port), backlog=128)
        except OSError:
            continue
    raise OSError(f"no free port on {_HOST}")


def _stop(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
