"""The user interfaces: on this machine only, over one home, on ports that are free."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from fedsft_assets.cli.ui.guard import FOREIGN, NO_TOKEN
from fedsft_assets.cli.ui.start import Server, listen, serve, study_servers, tensorboard_server
from fedsft_assets.defs.servers import CODE
from fedsft_assets.process_env import DAGSTER_PAGES, MLFLOW_PAGES
from fedsft_assets.settings import PROJECT, Settings
from fedsft_assets.store import Store
from fedsft_assets.tracking import EXPERIMENT, Tracking
from fedsft_assets.tracking.tensorboard import EventFiles
from fedsft_assets_tests.other_account import as_another_account, needs_another_account
from fedsft_assets_tests.tracking.examples import job_points, until
from fedsft_assets_tests.watched import PLANTED, open_to_others


@pytest.fixture
def settings(tmp_path: Path, empty_mlflow_database: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    shutil.copyfile(empty_mlflow_database, tmp_path / "mlflow.db")
    return Settings(home=tmp_path)


@pytest.fixture
def both(settings: Settings) -> Iterator[list[Server]]:
    servers = study_servers(settings)
    yield servers
    _close(servers)


def _close(servers: Iterable[Server]) -> None:
    for server in servers:
        if server.listener:
            server.listener.close()


def _unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_preferred_port_is_taken_when_it_is_free() -> None:
    port = _unused_port()
    with listen(port) as listener:
        assert listener.getsockname() == ("127.0.0.1", port)


def test_another_port_is_taken_when_somebody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with listen(port) as listener:
            assert listener.getsockname()[1] != port


def test_both_servers_listen_on_loopback_only_where_the_user_is_told(both: list[Server]) -> None:
    assert [server.title for server in both if server.url] == ["Dagster", "MLflow"]
    for server in both:
        assert bool(server.url) == bool(server.listener)
        if server.url and server.listener:
            host, port = server.listener.getsockname()
            assert host == "127.0.0.1"
            assert server.url.startswith(f"http://127.0.0.1:{port}/")
            assert server.listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)  # before anybody else can
        assert "0.0.0.0" not in " ".join(server.command)


def test_dagster_loads_what_the_workspace_file_names() -> None:
    assert yaml.safe_load((PROJECT / "workspace.yaml").read_text()) == {"load_from": [{"python_module": CODE}]}


def test_mlflow_shows_the_jobs_of_this_home(settings: Settings, both: list[Server]) -> None:
    *_, mlflow = both
    options = dict(zip(mlflow.command, mlflow.command[1:], strict=False))
    assert options["--backend-store-uri"] == settings.store.mlflow_uri
    assert options["--default-artifact-root"] == str(settings.store.mlflow_artifacts)
    experiment = Tracking(settings.store.mlflow_uri).client().get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    assert f"/#/experiments/{experiment.experiment_id}/runs" in str(mlflow.url)


def test_no_mlflow_is_started_beside_a_tracking_server_of_the_users(settings: Settings) -> None:
    theirs = settings.model_copy(update={"mlflow_uri": "http://tracking:5000"})
    servers = study_servers(theirs)
    _close(servers)
    assert [server.title for server in servers if server.url] == ["Dagster"]


def test_tensorboard_serves_the_curves_of_this_home_on_loopback_only(settings: Settings) -> None:
    server = tensorboard_server(settings)
    options = dict(zip(server.command, server.command[1:], strict=False))
    assert options["--logdir"] == str(settings.home / "tensorboard")
    assert server.listener is not None
    host, port = server.listener.getsockname()
    _close([server])
    assert host == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{port}/"


def test_servers_hear_signals_also_in_the_background_of_a_script(tmp_path: Path) -> None:
    """There SIGINT is ignored, and Dagster gives SIGTERM the handler that SIGINT had."""
    heard = tmp_path / "heard"
    server = f"import signal; print(signal.getsignal(signal.SIGINT), file=open({str(heard)!r}, 'w'))"
    serving = f"""
import sys
from fedsft_assets.settings import Settings
from fedsft_assets.cli.ui.start import Server, serve
serve(Settings(), [Server("a server", "nowhere", [sys.executable, "-c", {server!r}])])
"""
    subprocess.run(
        [sys.executable, "-c", serving],
        env={**os.environ, "FEDSFT_HOME": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
        check=True,
    )
    assert "default_int_handler" in heard.read_text()


_SAY = """
import json, sys
from fedsft_assets.cli.ui.process import Start
start = Start.read()
json.dump({"token": start.token, "port": start.socket().getsockname()[1]}, open(sys.argv[1], "w"))
"""


@pytest.mark.parametrize("token_file", [False, True])
def test_token_reaches_the_server_and_the_user_and_nobody_else(
    tmp_path: Path, token_file: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a token of the operator's, what is printed may go to a log."""
    monkeypatch.setattr("signal.signal", lambda *_: None)
    fixed, heard = tmp_path / "token", tmp_path / "heard"
    fixed.write_text("a-token-of-the-operators_3141")
    fixed.chmod(0o600)
    listener = listen(0)
    port = listener.getsockname()[1]
    command = [sys.executable, "-c", _SAY, str(heard)]
    url = f"http://127.0.0.1:{port}/page#part"
    settings = Settings(home=tmp_path, ui_token_file=fixed if token_file else None)
    serve(settings, [Server("a server", url, command, listener=listener)])
    said, token = json.loads(heard.read_text()), fixed.read_text()
    assert said["port"] == port
    shown = capfd.readouterr().out.splitlines()
    if token_file:
        assert said["token"] == token
        assert shown[:2] == [f"a server:    {url}", f"append ?token=… with the token in {fixed}"]
        assert token not in "".join(shown)
    else:
        assert said["token"] != token
        assert shown[0] == f"a server:    http://127.0.0.1:{port}/page?token={said['token']}#part"


def test_a_server_that_ends_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    here = tmp_path / "pid"
    stays = f"import os, pathlib, time; pathlib.Path({str(here)!r}).write_text(str(os.getpid())); time.sleep(600)"
    ends = f"import pathlib, time\nwhile not pathlib.Path({str(here)!r}).exists(): time.sleep(0.05)"
    commands = [[sys.executable, "-c", program] for program in (stays, ends)]
    serve(Settings(home=tmp_path), [Server("a server", None, command) for command in commands])
    pid = int(here.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_processes_know_the_addresses_of_both_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    heard = tmp_path / "heard"
    program = f"import json, os, pathlib; pathlib.Path({str(heard)!r}).write_text(json.dumps(dict(os.environ)))"
    dagster, mlflow = listen(0), listen(0)
    ports = [listener.getsockname()[1] for listener in (dagster, mlflow)]
    stays = [sys.executable, "-c", "import time; time.sleep(600)"]
    serve(
        Settings(home=tmp_path),
        [
            Server("MLflow", f"http://127.0.0.1:{ports[1]}/#/x", stays, listener=mlflow),
            Server("Dagster", f"http://127.0.0.1:{ports[0]}/x", stays, listener=dagster),
            Server("Dagster's daemon", None, [sys.executable, "-c", program]),
        ],
    )
    environment = json.loads(heard.read_text())
    assert environment[DAGSTER_PAGES] == f"http://127.0.0.1:{ports[0]}"
    assert environment[MLFLOW_PAGES] == f"http://127.0.0.1:{ports[1]}"


def test_token_file_that_others_can_read_is_refused_in_one_line(tmp_path: Path) -> None:
    fixed = tmp_path / "token"
    fixed.write_text("a-token-of-the-operators_3141")
    fixed.chmod(0o644)
    environment = {**os.environ, "FEDSFT_HOME": str(tmp_path / "home"), "FEDSFT_UI_TOKEN_FILE": str(fixed)}
    command = [sys.executable, "-m", "fedsft_assets.cli", "tensorboard"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(f"FEDSFT_UI_TOKEN_FILE: {fixed}: belongs to uid {os.geteuid()}, mode 0644, so others")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_tensorboard_shows_each_execution_anew_and_ends_with_its_command(tmp_path: Path) -> None:
    """As `make tensorboard` starts it, asked over HTTP. An execution takes the place of the one before."""
    folder, points = Store(tmp_path).tensorboard("fedavg"), job_points()
    EventFiles(folder, job_points(rounds=5)).close()
    environment = {**os.environ, "FEDSFT_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "fedsft_assets.cli", "tensorboard"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as ui:
        try:
            assert ui.stdout is not None
            url = ui.stdout.readline().split()[-1]
            assert url.startswith("http://127.0.0.1:")
            until(lambda: _curve(url, 6), "six values of the first execution")
            EventFiles(folder, points).close()
            until(lambda: _curve(url, 3), "three values of the second execution, and no other")
            assert [(step, value) for _, step, value in _curve(url, 3)] == [(0, 7.0), (64, 2.0), (128, 2.5)]
            processes = psutil.Process(ui.pid).children(recursive=True)
            sockets = [connection for process in processes for connection in process.net_connections()]
            listening = {socket.laddr.ip for socket in sockets if socket.status == psutil.CONN_LISTEN}
            assert listening == {"127.0.0.1"}
            assert len([socket for socket in sockets if socket.status == psutil.CONN_LISTEN]) == 1
            for path in ("", "data/plugin/scalars/tags", "data/logdir"):
                assert _refused(url, path) == (401, NO_TOKEN)
        finally:
            ui.terminate()
    psutil.wait_procs(processes, timeout=30)
    assert [process for process in processes if process.is_running()] == []


def _listening(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_socket()}


@pytest.mark.slow
def test_sockets_are_for_their_owner_and_gone_at_the_end_and_mlflow_knows_no_secret(tmp_path: Path) -> None:
    """As `make ui` starts it. A socket's path is short, so the folder for temporary files is not in the test's own."""
    command = [sys.executable, "-m", "fedsft_assets.cli", "ui"]
    with tempfile.TemporaryDirectory(prefix="fedsft-") as temporary:
        kept = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
        environment = {**kept, **PLANTED, "FEDSFT_HOME": str(tmp_path), "TMPDIR": temporary}
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with subprocess.Popen(command, env=environment, umask=0, **silent) as ui:  # type: ignore[call-overload]
            try:
                until(lambda: len(_listening(Path(temporary))) >= 2, "the sockets of Dagster's code servers")
                processes = psutil.Process(ui.pid).children(recursive=True)
                mlflow = [process.environ() for process in processes if "mlflow" in process.cmdline()]
                dagster = [process.environ() for process in processes if "dagster" in process.cmdline()]
                assert mlflow
                assert not [name for environment in mlflow for name in environment.keys() & PLANTED.keys()]
                assert PLANTED.items() <= dagster[0].items()  # its steps download
                assert [path for path in open_to_others(Path(temporary)) if path.name != "__pycache__"] == []
                assert open_to_others(tmp_path) == []
            finally:
                ui.terminate()
        assert _listening(Path(temporary)) == set()
        assert list(Path(temporary).glob("fedsft-*")) == []


@pytest.fixture(scope="module")
def ui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, dict[str, str]]]:
    """As `make ui` starts it: its pid, and the links by title. They are answered when the servers are ready."""
    kept = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    environment = {**kept, "FEDSFT_HOME": str(tmp_path_factory.mktemp("home"))}
    command = [sys.executable, "-m", "fedsft_assets.cli", "ui"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(2)]
            yield process.pid, dict(line.split() for line in lines)
        finally:
            process.terminate()


@pytest.mark.slow
@pytest.mark.parametrize("title", ["Dagster:", "MLflow:"])
def test_study_pages_are_answered_with_the_token_only(ui: tuple[int, dict[str, str]], title: str) -> None:
    url = ui[1][title]
    for path in ("", "graphql", "graphql?query={version}", "api/2.0/mlflow/experiments/search", "health", "version"):
        for content in (None, b"{}"):
            assert _refused(url, path, content) == (401, NO_TOKEN)
            assert _refused(url, path, content, Origin="http://evil.example", **_bearer(url)) == (403, FOREIGN)
            assert _refused(url, path, content, Host="evil.example", **_bearer(url)) == (403, FOREIGN)
    assert b"<html" in _asked(url, "")


@pytest.mark.slow
def test_dagster_answers_queries_and_subscriptions_with_the_token(ui: tuple[int, dict[str, str]]) -> None:
    url = ui[1]["Dagster:"]
    query = b'{"query": "{ repositoriesOrError { ... on RepositoryConnection { nodes { name location { name } } } } }"}'
    until(lambda: _asked(url, "graphql", query, **{"Content-Type": "application/json"}), "an answer")
    answer = json.loads(_asked(url, "graphql", query, **{"Content-Type": "application/json"}))
    (repository,) = answer["data"]["repositoriesOrError"]["nodes"]
    assert repository["location"]["name"] == CODE

    address = f"{_base(url)}graphql".replace("http:", "ws:")
    subscription = "subscription { locationStateChangeEvents { event { message } } }"
    with connect(address, additional_headers=_bearer(url), subprotocols=[Subprotocol("graphql-ws")]) as talk:
        talk.send(json.dumps({"type": "connection_init"}))
        assert json.loads(talk.recv(timeout=30)) == {"type": "connection_ack"}
        talk.send(json.dumps({"type": "start", "id": "1", "payload": {"query": subscription}}))
        with pytest.raises(TimeoutError):  # nothing has changed, and nothing is wrong
            talk.recv(timeout=2)
    for headers, status in (({}, 401), ({**_bearer(url), "Origin": "http://evil.example"}, 403)):
        with pytest.raises(InvalidStatus) as refused, connect(address, additional_headers=headers):
            pass
        assert refused.value.response.status_code == status


@pytest.mark.slow
def test_daemon_of_dagster_runs_beside_its_pages(ui: tuple[int, dict[str, str]]) -> None:
    url = ui[1]["Dagster:"]
    query = b'{"query": "{ instance { daemonHealth { allDaemonStatuses { daemonType required healthy } } } }"}'

    def healthy() -> bool:
        answer = json.loads(_asked(url, "graphql", query, **{"Content-Type": "application/json"}))
        statuses = answer["data"]["instance"]["daemonHealth"]["allDaemonStatuses"]
        required = {status["daemonType"]: status["healthy"] for status in statuses if status["required"]}
        return {"SENSOR", "SCHEDULER"} <= required.keys() and all(required.values())

    until(healthy, "schedules, sensors and the queue of runs are looked after")


@pytest.mark.slow
def test_client_of_mlflow_is_let_in_with_the_token(
    ui: tuple[int, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = ui[1]["MLflow:"]
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", _token(url))
    assert Tracking(_base(url).rstrip("/")).client().get_experiment_by_name(EXPERIMENT) is not None


_ASK_ALL = """
import socket, sys
page = ["GET /graphql?query={version} HTTP/1.1", "Host: 127.0.0.1:" + sys.argv[1], "", ""]
talk = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Protocol: graphql-ws"]
talk = [*page[:2], *talk, "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "", ""]
for asked in (page, talk):
    with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as asking:
        asking.sendall("\\r\\n".join(asked).encode())
        print(asking.recv(4096).decode().splitlines()[0])
for path in sys.argv[2:]:
    with socket.socket(socket.AF_UNIX) as asking:
        try:
            asking.connect(path)
            print("connected")
        except PermissionError:
            print("refused")
"""


@pytest.mark.slow
@needs_another_account
def test_another_account_gets_nothing_from_any_listener(ui: tuple[int, dict[str, str]]) -> None:
    until(lambda: _asked(ui[1]["Dagster:"], "server_info"), "Dagster is ready, so all of its processes are there")
    pid, links = ui
    processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    connections = [one for process in processes for one in process.net_connections("all")]
    ports = {str(one.laddr.port) for one in connections if one.status == psutil.CONN_LISTEN}
    files = {str(one.laddr) for one in connections if one.family == socket.AF_UNIX and one.laddr}
    assert ports == {str(urllib.parse.urlsplit(link).port) for link in links.values()}
    assert len(files) == 2  # of Dagster's code server, and of the one behind it
    for port in ports:
        said = as_another_account(_ASK_ALL, port, *files).splitlines()
        assert said == ["HTTP/1.1 401 Unauthorized"] * 2 + ["refused"] * 2


@pytest.mark.slow
def test_token_is_in_no_command_line_and_no_environment(ui: tuple[int, dict[str, str]]) -> None:
    tokens = {_token(link) for link in ui[1].values()}
    assert len(tokens) == 1
    for process in [psutil.Process(ui[0]), *psutil.Process(ui[0]).children(recursive=True)]:
        assert not tokens & set(re.split(r"[=\s]", " ".join([*process.cmdline(), *process.environ().values()])))


def _base(link: str) -> str:
    return f"http://{urllib.parse.urlsplit(link).netloc}/"


def _token(link: str) -> str:
    return dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(link).query))["token"]


def _bearer(link: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {_token(link)}"}


def _asked(link: str, path: str, content: bytes | None = None, **headers: str) -> bytes:
    """What the server of this link answers there, asked with its token."""
    request = urllib.request.Request(_base(link) + path, content, {**_bearer(link), **headers})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return bytes(answer.read())


def _refused(link: str, path: str, content: bytes | None = None, **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(_base(link) + path, content, headers)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=120)
    return refused.value.code, refused.value.read().decode()


def _curve(link: str, length: int) -> list[list[float]]:
    """The job's val_loss as TensorBoard has it, if that is the only execution and so long; else nothing."""
    try:
        tags = json.loads(_asked(link, "data/plugin/scalars/tags"))
        runs = [run for run in tags if not run.endswith(("site-1", "site-2"))]
        if len(runs) != 1:
            return []
        query = urllib.parse.urlencode({"run": runs[0], "tag": "val_loss"})
        curve: list[list[float]] = json.loads(_asked(link, f"data/plugin/scalars/scalars?{query}"))
        return curve if len(curve) == length else []
    except OSError:
        return []
