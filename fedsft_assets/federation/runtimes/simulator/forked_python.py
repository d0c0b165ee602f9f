"""Stands in for `python3 -m <module>` where a fork server runs, and is the process that others see.

It ends as its fork does; when it is ended, so is the fork. Only the standard library is imported, little of it, so
that it starts in a few milliseconds and needs next to no memory.
"""

import os
import socket
import struct
import sys

ADDRESS = "FEDSFT_FORK_SERVER"  # names the server's socket
LENGTH, CODE = struct.Struct("!I"), struct.Struct("!i")
LOST = os.EX_TEMPFAIL  # the exit code where the server is gone: what was asked for may be asked for again
_SEPARATOR = "\0"  # of the fields of a request


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "-u"]
    if ADDRESS not in os.environ or arguments[:1] != ["-m"]:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
    fields = [os.getcwd(), str(len(arguments) - 1), *arguments[1:]]  # noqa: PTH109 nothing more is imported here
    fields += [f"{name}={value}" for name, value in os.environ.items()]
    request = _SEPARATOR.join(fields).encode("utf-8", "surrogateescape")
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect("\0" + os.environ[ADDRESS])
            _require_own_user(connection)
            socket.send_fds(connection, [LENGTH.pack(len(request))], [0, 1, 2])
            connection.sendall(request)
            code = connection.recv(CODE.size, socket.MSG_WAITALL)
    except OSError as error:
        _end_lost(f"the job's fork server does not answer: {error}")
    if len(code) < CODE.size:
        _end_lost("the job's fork server is gone")
    _end(CODE.unpack(code)[0])


def _require_own_user(connection: socket.socket) -> None:
    """As in `peer`: where the server is gone, another account can take its name."""
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if user != os.geteuid():
        raise PermissionError(f"user {user} answers in its place")


def _end_lost(reason: str) -> None:
    print(reason, file=sys.stderr)
    sys.exit(LOST)


def _end(code: int) -> None:
    """End with an exit code, or by the signal that it says."""
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
