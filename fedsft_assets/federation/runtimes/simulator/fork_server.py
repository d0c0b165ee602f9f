"""A process that has imported what many others need, and forks them: they start at once and share its memory.

Whoever starts a process as NVFlare does, by a command, starts `forked_python.py` instead of `python3`. That asks here
for a fork, which gets its arguments, environment, folder and standard streams, and lives exactly as long as it does.
Linux only: elsewhere a fork of a process that has loaded so much is not safe.
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

_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_TO_ASK = 10.0
_STREAMS = 3


def can_fork() -> bool:
    """Whether this machine has what a fork server needs."""
    return sys.platform == "linux"


class ForkServer:
    """The server process, as whoever starts it sees it. It ends when its starter does, with all that it forked."""

    def __init__(
        self, folder: Path, first: Sequence[str], modules: Sequence[str], base_model: Path | None = None
    ) -> None:
        """`folder` is for the stand-in for `python3`.

        Processes find `first` imported; those that are asked for later on, also `modules` and the code of the base
        model's architecture.
        """
        self._folder = folder
        archive = str(base_model) if base_model else None
        self._imports = {"first": [*first], "modules": [*modules], "base_model": archive}
        self._process: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, str] = {}
        """What a process needs to reach the server by `python`."""

    @property
    def python(self) -> Path:
        """In place of `python3`, for commands `python3 -m <module> …`."""
        return self._folder / "python3"

    def start(self, environment: dict[str, str]) -> None:
        """Start the server unless it runs; processes may ask for forks from now on, and wait while it imports."""
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
        # In a file: who looks for a trainer's command line must not find the server's.
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
        """Of the server's process; 0 before it was started."""
        return self._process.pid if self._process else 0

    def stop(self) -> None:
        if self._process:
            self._process.terminate()
            self._process.wait()


@dataclass
class _Fork:
    """A process that is to be, or is, forked for whoever asks."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    streams: list[int]

    def run(self) -> None:
        """Run what was asked for, in the process that was forked for it, as `python3 -u -m` would."""
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
    """The loop of the server process, which has one thread, always."""

    def __init__(self, listener: socket.socket, parent: int) -> None:
        self._listener, self._parent = listener, parent
        self._children: dict[int, socket.socket] = {}
        self._selector = selectors.DefaultSelector()
        self._woken, waker = socket.socketpair()
        for end in (self._woken, waker):
            end.setblocking(False)
        self._waker = waker
        signal.signal(signal.SIGCHLD, lambda *_: None)  # so that the wake-up is written
        signal.set_wakeup_fd(waker.fileno())
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(self._woken, selectors.EVENT_READ)

    def serve(self) -> _Fork | None:
        """Fork for whoever asks; returns in a forked process what that is to become, and None when all is over."""
        while os.getppid() == self._parent:
            if fork := self.serve_waiting(_SECONDS_BETWEEN_LOOKS):
                return fork
        return None

    def serve_waiting(self, seconds: float = 0.0) -> _Fork | None:
        """The same until nothing happens for so many seconds."""
        while happened := self._selector.select(seconds):
            for key, _ in happened:
                if key.fileobj is self._listener:
                    if fork := self._accept():
                        return fork
                elif key.fileobj is self._woken:
                    self._woken.recv(4096)
                else:
                    self._end(key.data)  # who asked for it is gone
            self._reap()
        self._reap()
        return None

    def end_all(self) -> None:
        for pid in self._children:
            self._end(pid)

    def _accept(self) -> _Fork | None:
        connection, _ = self._listener.accept()
        try:
            fork = _request(connection)
        except (OSError, ValueError) as error:
            print(f"a process could not be forked: {error!r}")
            connection.close()
            return None
        pid = os.fork()
        if pid == 0:
            os.setsid()
            connection.close()  # else who asked would wait for this process, were the server gone
            self._let_go()
            return fork
        for stream in fork.streams:
            os.close(stream)
        self._children[pid] = connection
        self._selector.register(connection, selectors.EVENT_READ, pid)
        return None

    def _let_go(self) -> None:
        """Close what is the server's, in a process that was forked."""
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        self._selector.close()
        for connection in (self._listener, self._woken, self._waker, *self._children.values()):
            connection.close()
        self._children = {}

    def _reap(self) -> None:
        """Tell the exit codes of what has ended."""
        while self._children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            connection = self._children.pop(pid)
            self._selector.unregister(connection)
            try:
                connection.sendall(CODE.pack(os.waitstatus_to_exitcode(status)))
            except OSError:
                pass  # who asked for it is gone
            connection.close()

    def _end(self, pid: int) -> None:
        """Kill the process and whatever it started in its group."""
        try:
            os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


def _request(connection: socket.socket) -> _Fork:
    """What is asked for. Raises ValueError or OSError if that does not come whole, or from another user."""
    connection.settimeout(_SECONDS_TO_ASK)
    require_own_user(connection)
    head, streams, _, _ = socket.recv_fds(connection, LENGTH.size, _STREAMS)
    content = connection.recv(LENGTH.unpack(head)[0], socket.MSG_WAITALL)
    folder, count, *rest = content.decode("utf-8", "surrogateescape").split("\0")
    environment = dict(pair.split("=", 1) for pair in rest[int(count) :])
    return _Fork(rest[: int(count)], environment, folder, streams)


def _import_and_serve(
    server: _ForkLoop, first: Sequence[str], modules: Sequence[str], base_model: str | None
) -> _Fork | None:
    """Import everything, and fork in between for whoever waits once `first` is imported, as `_ForkLoop.serve` does."""
    for name in first:
        _import(name)
    for name in modules:
        if fork := server.serve_waiting():
            return fork
        _import(name)
    if base_model:
        from fedsft_assets.model.errors import ModelError
        from fedsft_assets.model.language_model import import_architecture

        try:
            import_architecture(Path(base_model))
        except ModelError as error:
            print(error)  # whoever loads it will say so too
        gc.freeze()
    return None


def _import(module: str) -> None:
    gc.disable()
    importlib.import_module(module)
    gc.freeze()  # forks share what they do not change, and a collection changes what it looks at
    gc.enable()


def main() -> None:
    parser = argparse.ArgumentParser(description="Import modules, and fork processes that need them.")
    parser.add_argument("--listener", type=int, required=True, help="the descriptor of a listening socket")
    parser.add_argument("--parent", type=int, required=True, help="the process without which this one ends")
    parser.add_argument("--imports", type=Path, required=True, help="a JSON file with what is to be imported")
    args = parser.parse_args()
    imports = json.loads(args.imports.read_text(encoding="utf-8"))
    server = _ForkLoop(socket.socket(fileno=args.listener), args.parent)
    try:
        fork = _import_and_serve(server, **imports) or server.serve()
    finally:
        server.end_all()
    if fork:
        fork.run()


if __name__ == "__main__":
    main()
