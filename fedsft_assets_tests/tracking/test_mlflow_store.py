"""How long MLflow may take to answer, in every process of this project, and where its pages are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedsft_assets.process_env import MLFLOW_PAGES
from fedsft_assets.tracking import Tracking

_TIMEOUT, _RETRIES = "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
_LIMITS = """
import os, subprocess, sys
from fedsft_assets.tracking.mlflow_store import limit_requests
limit_requests(int(sys.argv[1]))
print(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"], os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"], flush=True)
if sys.argv[2:]:
    subprocess.run([sys.executable, "-c", os.environ["CODE"], *sys.argv[2:]], check=True)
"""


@pytest.mark.parametrize(
    ("of_user", "expected"),
    [
        ({}, ["10 0", "40 0"]),
        ({_TIMEOUT: "7"}, ["7 0", "7 0"]),
        ({_TIMEOUT: "7", _RETRIES: "2"}, ["7 2", "7 2"]),
    ],
)
def test_limits_that_the_user_has_set_hold_and_those_of_a_parent_do_not(
    of_user: dict[str, str], expected: list[str]
) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "FEDSFT_"))}
    environment = {**inherited, **of_user, "CODE": _LIMITS}
    command = [sys.executable, "-c", _LIMITS, "10", "40"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == expected


def test_pages_are_those_of_the_server_or_of_the_user_interface(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(MLFLOW_PAGES, raising=False)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    assert Tracking("http://tracking:5000/").pages == "http://tracking:5000/#"
    assert Tracking(store).pages is None
    monkeypatch.setenv(MLFLOW_PAGES, "http://127.0.0.1:5000")
    assert Tracking(store).pages == "http://127.0.0.1:5000/#"
