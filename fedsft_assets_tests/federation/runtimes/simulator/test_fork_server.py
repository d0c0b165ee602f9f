"""Processes from the fork server: like others, but with everything imported."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fedsft_assets.federation.protocol.events import JobError
from fedsft_assets.federation.runtimes.simulator.fork_server import ForkServer, can_fork
from fedsft_assets.federation.runtimes.simulator.forked_python import LOST
from fedsft_assets.federation.supervisor.checkpoint import make_checkpoint

pytestmark = pytest.mark.skipif(not can_fork(), reason="processes are forked on Linux only")

_MODULE = """
import json, os, sys, time
said = {"argv": sys.argv[1:], "folder": os.getcwd(), "said": os.environ.get("SAID"), "pid": os.getpid(),
        "session": os.getsid(0), "main": __name__, "imported": "xmlrpc.client" in sys.modules, "python": sys.executable}
print(json.dumps(said))
print("an error", file=sys.stderr)
what, *rest = sys.argv[1:] or ["end"]
if what == "raise":
    raise ValueError("this went wrong")
if what == "code":
    sys.exit(int(rest[0]))
if what == "wait":
    time.sleep(600)
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path / "a folder", ["email"], ["xmlrpc.client"])
    server.start(dict(os.environ))
    yield server
    server.stop()


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A folder with a module in it, from which processes are started."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "forked_example.py").write_text(_MODULE, encoding="utf-8")
    return folder


def _start(server: ForkServer, work: Path, *arguments: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [str(server.python), "-u", "-m", "forked_example", *arguments],
        cwd=work,
        env={**os.environ, **server.environment, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _said(process: "subprocess.Popen[str]") -> dict[str, Any]:
    assert process.stdout is not None
    said: dict[str, Any] = json.loads(process.stdout.readline())
    return said


def _kill(server: ForkServer) -> None:
    """Returns when it is dead: its sockets close before."""
    os.kill(server.pid, signal.SIGKILL)
    os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)


def test_fork_has_the_arguments_folder_environment_and_streams_that_it_was_started_with(
    server: ForkServer, work: Path
) -> None:
    process = _start(server, work, "end", "a b", "", SAID="two\nlines = ü")
    said = _said(process)
    assert said["argv"] == ["end", "a b", ""]
    assert (said["folder"], said["said"], said["main"]) == (str(work), "two\nlines = ü", "__main__")
    assert process.communicate() == ("", "an error\n")
    assert process.returncode == 0


def test_fork_has_imported_what_the_server_has_and_is_a_session_of_its_own(server: ForkServer, work: Path) -> None:
    _said(_start(server, work))  # which waits until the server has imported all
    said = _said(_start(server, work))
    assert said["imported"]
    assert said["session"] == said["pid"]
    assert said["python"] == sys.executable


@pytest.mark.parametrize("code", [0, 1, 3])
def test_exit_code_is_that_of_the_fork(server: ForkServer, work: Path, code: int) -> None:
    assert _start(server, work, "code", str(code)).wait() == code


def test_traceback_is_printed_as_by_python(server: ForkServer, work: Path) -> None:
    process = _start(server, work, "raise")
    _, errors = process.communicate()
    assert process.returncode == 1
    assert errors.splitlines()[-1] == "ValueError: this went wrong"


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_fork_is_killed_with_its_representative(server: ForkServer, work: Path, sign: signal.Signals) -> None:
    process = _start(server, work, "wait")
    fork = psutil.Process(_said(process)["pid"])
    process.send_signal(sign)
    assert process.wait() == -sign
    fork.wait(timeout=30)


def test_representative_ends_by_the_same_signal_as_its_fork(server: ForkServer, work: Path) -> None:
    process = _start(server, work, "wait")
    os.kill(_said(process)["pid"], signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def test_forks_end_when_the_server_is_stopped(server: ForkServer, work: Path) -> None:
    processes = [_start(server, work, "wait") for _ in range(3)]
    forks = [psutil.Process(_said(process)["pid"]) for process in processes]
    server.stop()
    for fork in forks:
        fork.wait(timeout=30)
    assert [process.wait() for process in processes] == [LOST] * 3


def test_killed_server_is_reported_by_every_process_and_can_be_restarted(server: ForkServer, work: Path) -> None:
    process = _start(server, work, "wait")
    fork = psutil.Process(_said(process)["pid"])
    _kill(server)
    assert process.wait() == LOST
    fork.kill()  # which whoever ends the job does, by its mark
    _, errors = process.communicate()
    assert "the job's fork server is gone" in errors.splitlines()
    server.start(dict(os.environ))
    assert _start(server, work, "code", "4").wait() == 4


def test_checkpoint_whose_process_is_lost_with_the_server_can_be_made_by_another_attempt(
    server: ForkServer, work: Path
) -> None:
    _kill(server)
    command, environment = [str(server.python), "-m", "forked_example"], {**os.environ, **server.environment}
    with pytest.raises(JobError, match="the job's fork server does not answer") as lost:
        make_checkpoint(command, environment, work, work, work, work)
    assert lost.value.retryable
    server.start(dict(os.environ))
    environment |= server.environment
    with pytest.raises(JobError, match="No module named forked_example") as failed:
        make_checkpoint(command, environment, work, work, work, work)
    assert not failed.value.retryable


def test_other_commands_than_modules_are_run_by_python_itself(server: ForkServer) -> None:
    command = [str(server.python), "-c", "import sys; print(sys.executable)"]
    done = subprocess.run(command, env={**os.environ, **server.environment}, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == sys.executable


def test_server_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    script = (
        "import os, sys; from pathlib import Path;"
        "from fedsft_assets.federation.runtimes.simulator.fork_server import ForkServer;"
        "server = ForkServer(Path(sys.argv[1]), [], ['json']); server.start(dict(os.environ));"
        "print(server.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "python")], capture_output=True, text=True, check=False
    )
    pid = int(done.stdout)
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.1)
