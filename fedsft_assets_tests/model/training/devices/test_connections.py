"""Connections on this machine whose other end may be another account's."""

import os
import socket
import subprocess
import sys

import pytest

from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.training.devices.connections import require_own_connections
from fedsft_assets_tests import stranger

_CALL = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as connection:
    print("there", flush=True)
    connection.recv(1)
"""


def _called(as_user: list[str]) -> None:
    """Look at a connection that another process has made."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [*as_user, sys.executable, "-c", _CALL, str(server.getsockname()[1])]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd="/") as caller:
            connection, _ = server.accept()
            with connection:
                assert caller.stdout
                caller.stdout.readline()
                require_own_connections()


def test_own_processes_may_be_connected() -> None:
    _called([])


@pytest.mark.skipif(stranger.why_not() is not None, reason=str(stranger.why_not()))
def test_process_of_another_account_is_told_of() -> None:
    with pytest.raises(ModelError, match=f"user {stranger.NOBODY} of this machine has connected in place of one of"):
        _called(stranger.as_nobody())
    assert os.geteuid() != stranger.NOBODY
