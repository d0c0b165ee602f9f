"""What another account of this machine gets, for tests that root runs: only root can be somebody else."""

import os
import shutil
import subprocess

import pytest

_PATH = "/usr/local/bin:/usr/bin:/bin"  # programs that everybody may run
_PYTHON = shutil.which("python3", path=_PATH)
_SETPRIV = shutil.which("setpriv")

needs_another_account = pytest.mark.skipif(
    os.geteuid() != 0 or not _PYTHON or not _SETPRIV, reason="needs root, setpriv, and a python3 for everybody"
)


def as_another_account(program: str, *words: str) -> str:
    """What a Python program prints that an account without any rights runs. Raises CalledProcessError."""
    account = [str(_SETPRIV), "--reuid=65534", "--regid=65534", "--clear-groups"]
    command = [*account, str(_PYTHON), "-c", program, *words]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd="/", timeout=60).stdout.strip()
