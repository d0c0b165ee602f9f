"""A fork server: it imports modules once and forks processes, which start at once and share its memory.

NVFlare starts processes by a command. `forked_python.py` takes the place of `python3` in that command: it requests a
fork, which gets its arguments, environment, working directory and standard streams, and has the same lifetime. Linux
only: elsewhere it is not safe to fork a process that has loaded so much.
"""

import argparse
import gc
import importlib
import json
import os
import runpy
import selectors
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedsft_assets.federation.connections.peer import require_own_user
from fedsft_assets.federation.runtimes.simulator import forked_python
from fedsft_assets.federation.runtimes.simulator.forked_python import ADDRESS, CODE, LENGTH

_PARENT_CHECK_SECONDS = 0.5
_REQUEST_TIMEOUT = 10.0
_STREAMS = 3  # standard input, output and error


def can_fork() -> bool:
    """Whether a fork server works on this platform."""
    return sys.platform == "linux"


class ForkServer:
    """A handle on the server process, which ends with the process that starts it, and kills its forks when it ends."""

    def __init__(
        self, folder: Path, first: Sequence[str], modules: Sequence[str], base_model: Path | None = None
    ) -> None:
        """`folder` takes the executable in place of `python3`, and the log.

        No process is forked before `first` is imported; `modules` and the code of the base model's architecture follow
        while the server already forks.
        """
        self._folder = folder
        archive = str(base_model) if base_model else None
        self._imports = {"first": [*first], "modules": [*modules], "base_model": archive}
        self._process: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, str] = {}
        """Variables that `python` needs to reach the server."""

    @property
    def python(self) -> Path:
        """The executable to use in place of `python3`, for commands `python3 -m <module> …`."""
        return self._folder / "python3"

    def start(self, environment: dict[str, str]) -> None:
        """Start the server unless it is running. Requests are accepted at once, and wait while it imports `first`."""
        if self._process and self._process.poll() is None:
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self.python.write_text(
            f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -I -S {shlex.quote(forked_python.__file__)} "$@"\n',
            encoding="utf-8",
        )
        self.python.chmod(stat.S_IRWXU)
        name = f"fedsft-{uuid.uuid4().hex}"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(f"\0{name}")
        listener.listen(1024)
        self.environment = {ADDRESS: name}
        # In a file, so that the server's command line does not look like that of a trainer.
        imports = self._folder / "imports.json"
        imports.write_text(json.dumps(self._imports), encoding="utf-8")
        options = ["--listener", str(listener.fileno()), "--parent", str(os.getpid()), "--imports", str(imports)]
        with listener, (self._folder / "fork_server.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-m", __name__, *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[listener.fileno()],
            )

    @property
    def pid(self) -> int:
        """The server's pid; 0 before it is started."""
        return self._process.pid if self._process else 0

    def stop(self) -> None:
        if self._process:
            self._process.terminate()
            self._process.wait()


@dataclass
class _Fork:
    """A requested process."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    streams: list[int]

    def run(self) -> None:
        """Run the requested module in the forked process, as `python3 -u -m` would."""
        for number, stream in enumerate(self.streams):
            os.dup2(stream, number)
            os.close(stream)
        os.environ.clear()
        os.environ.update(self.environment)
        os.chdir(self.folder)
        sys.path[:0] = [self.folder, *filter(None, self.environment.get("PYTHONPATH", "").split(os.pathsep))]
        module, *rest = self.arguments
        sys.argv = [module, *rest]
        sys.modules.pop(module, None)  # it runs as the main module
        runpy.run_module(module, run_name="__main__", alter_sys=True)


class _ForkLoop:
    """The server process's loop, in one thread."""

    def __init__(self, listener: socket.socket, parent: int) -> None:
        self._listener, self._parent = listener, parent
        self._children: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._woken, waker = socket.socketpair()
        for end in (self._woken, waker):
            end.setblocking(False)
        self._waker = waker
        signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler must exist for the wakeup descriptor to be written
        signal.set_wakeup_fd(waker.fileno())
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)

    def serve(self) -> _Fork | None:
        """Fork on request until the parent ends. Returns None then, and the request in each forked process."""
        while os.getppid() == self._parent:
            if fork := self.serve_pending(_PARENT_CHECK_SECONDS):
                return fork
        return None

    def serve_pending(self, seconds: float = 0.0) -> _Fork | None:
        """Like `serve`, until nothing has happened for `seconds`."""
        while happened := self._selector.select(seconds):
            for key, _ in happened:
                if key.fileobj is self._listener:
                    if fork := self._accept():
                        return fork
                elif key.fileobj is self._woken:
                    self._woken.recv(4096)
                else:
                    self._kill(key.data)  # the requesting process is gone
            self._reap()
        self._reap()
        return None

    def kill_all(self) -> None:
        for pid in self._children:
            self._kill(pid)

    def _accept(self) -> _Fork | None:
        connection, _ = self._listener.accept()
        try:
            fork = _request(connection)
        except (OSError, ValueError) as error:
            print(f"invalid request for a process: {error!r}")
            connection.close()
            return None
        pid = os.fork()
        if pid == 0:
            os.setsid()
            connection.close()  # otherwise the requester would not notice the server's end
            self._close_inherited()
            return fork
        for stream in fork.streams:
            os.close(stream)
        self._children[pid] = connection
        self._selector.register(connection, selectors.EVENT_READ, pid)
        return None

    def _close_inherited(self) -> None:
        """Close the server's files and handlers in a forked process."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        self._selector.close()
        for connection in (self._listener, self._woken, self._waker, *self._children.values()):
            connection.close()
        self._children = {}

    def _reap(self) -> None:
        """Send the exit codes of forks that have ended."""
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            connection = self._children.pop(pid)
            self._selector.unregister(connection)
            try:
                connection.sendall(CODE.pack(os.waitstatus_to_exitcode(status)))
            except OSError:
                pass  # the requesting process is gone
            connection.close()

    def _kill(self, pid: int) -> None:
        """Kill a fork with its process group."""
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _request(connection: socket.socket) -> _Fork:
    """Read a request. Raises ValueError or OSError if it is incomplete, or from another user."""
    connection.settimeout(_REQUEST_TIMEOUT)
    require_own_user(connection)
    head, streams, _, _ = socket.recv_fds(connection, LENGTH.size, _STREAMS)
    content = connection.recv(LENGTH.unpack(head)[0], socket.MSG_WAITALL)
    folder, count, *rest = content.decode("utf-8", "surrogateescape").split("\0")
    environment = dict(pair.split("=", 1) for pair in rest[int(count) :])
    return _Fork(rest[: int(count)], environment, folder, streams)


def _import_and_serve(
    server: _ForkLoop, first: Sequence[str], modules: Sequence[str], base_model: str | None
) -> _Fork | None:
    """Import everything; once `first` is imported, serve pending requests in between, as `_ForkLoop.serve` does."""
    for name in first:
        _import(name)
    for name in modules:
        if fork := server.serve_pending():
            return fork
        _import(name)
    if base_model:
        from fedsft_assets.model.errors import ModelError
        from fedsft_assets.model.language_model import import_architecture

        try:
            import_architecture(Path(base_model))
        except ModelError as error:
            print(error)  # the process that loads the model reports it
        gc.freeze()
    return None


def _import(module: str) -> None:
    gc.disable()
    importlib.import_module(module)
    gc.freeze()  # a collection writes to the objects that it visits, which would unshare their pages
    gc.enable()


def main() -> None:
    parser = argparse.ArgumentParser(description="Import modules, and fork processes on request.")
    parser.add_argument("--listener", type=int, required=True, help="the descriptor of a listening socket")
    parser.add_argument("--parent", type=int, required=True, help="the pid of the process with which this one ends")
    parser.add_argument("--imports", type=Path, required=True, help="a JSON file that lists what to import")
    args = parser.parse_args()
    imports = json.loads(args.imports.read_text(encoding="utf-8"))
    server = _ForkLoop(socket.socket(fileno=args.listener), args.parent)
    try:
        fork = _import_and_serve(server, **imports) or server.serve()
    finally:
        server.kill_all()
    if fork:
        fork.run()


if __name__ == "__main__":
    main()
