"""A substitute for `python3 -m <module>`: requests a fork from the fork server and stands in for it.

It exits with its fork's exit code, and the fork is killed when it ends. It imports only a little of the standard
library, so that it starts within milliseconds and needs almost no memory.
"""

import os
import socket
import struct
import sys

ADDRESS = "FEDSFT_FORK_SERVER"  # the variable with the name of the server's abstract socket
LENGTH, CODE = struct.Struct("!I"), struct.Struct("!i")
LOST = os.EX_TEMPFAIL  # the exit code when the server is gone; the request may be repeated
_SEPARATOR = "\0"  # between the fields of a request


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
        _exit_lost(f"the job's fork server does not answer: {error}")
    if len(code) < CODE.size:
        _exit_lost("the job's fork server is gone")
    _exit(CODE.unpack(code)[0])


def _require_own_user(connection: socket.socket) -> None:
    """As in `connections.peer`: when the server is gone, another account could take its name."""
    _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if user != os.geteuid():
        raise PermissionError(f"its socket belongs to user {user}")


def _exit_lost(reason: str) -> None:
    print(reason, file=sys.stderr)
    sys.exit(LOST)


def _exit(code: int) -> None:
    """Exit with `code`, or by signal -`code` if it is negative."""
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
