"""The user id of a Unix socket's peer, as the kernel reports it, so that other accounts are refused. Linux only."""

import os
import socket
import struct

_CREDENTIALS = struct.Struct("3i")  # struct ucred: process, user and group id


def user_of(connection: socket.socket) -> int:
    """The user id of the peer at the time when it connected, or started to listen."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(credentials)[1])


def require_own_user(connection: socket.socket) -> None:
    """Raise PermissionError if the peer has another user id than this process."""
    user, own = user_of(connection), os.geteuid()
    if user != own:
        raise PermissionError(f"the peer has user id {user}; only user id {own} is accepted")
