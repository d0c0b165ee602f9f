"""Who is at the other end of a Unix socket, as the kernel says: no other account of this computer may be. Linux."""

import os
import socket
import struct

_CREDENTIALS = struct.Struct("3i")  # of the kernel: process, user, group


def user_of(connection: socket.socket) -> int:
    """The user id that the other end had when it connected, or began to listen."""
    said = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(said)[1])


def require_own_user(connection: socket.socket) -> None:
    """Raises PermissionError if the other end is not of this process's user."""
    user, own = user_of(connection), os.geteuid()
    if user != own:
        raise PermissionError(f"user {user} is at the other end of a socket that is for user {own} alone")
