"""`fedsft serve`: a registered version answers over HTTP, to who has the token, as `fedsft-generate` does."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from fedsft_assets.cli.ui.guard import NO_TOKEN
from fedsft_assets.federation.protocol.job_report import MODEL_FILE
from fedsft_assets.model.archive.nemo_archive import content_digest
from fedsft_assets.store import Store
from fedsft_assets.tracking import Tracking
from fedsft_assets.versions import current
from fedsft_assets_tests.prepared import prepare_home
from fedsft_assets_tests.tracking.conftest import lasting_server, running_server  # noqa: F401 fixtures
from fedsft_assets_tests.tracking.examples import REPORT, track, until
from fedsft_assets_tests.tracking.server import TrackingServer, unused_port

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, empty_mlflow_database: Path) -> Store:
    """A home with one checkpoint, which is not registered anywhere yet."""
    store = prepare_home(tmp_path_factory.mktemp("home"))
    shutil.copyfile(empty_mlflow_database, store.home / "mlflow.db")
    folder = store.checkpoint("fedavg") / "version"
    folder.mkdir(parents=True)
    shutil.copyfile(next(current(store.base_model("tiny")).glob("*.nemo")), folder / MODEL_FILE)
    return store


def _register(store: Store, tracking: Tracking) -> None:
    folder = store.checkpoint("fedavg") / "version"
    report = replace(REPORT, checkpoint_digest=content_digest(folder / MODEL_FILE))
    with track(tracking, store) as job:
        assert job.finish(report, folder, [], model="fedsft-tiny", data="d" * 64).version


@pytest.fixture(scope="module")
def home(store: Store) -> Path:
    """The home with the checkpoint registered in its own store, as no champion."""
    tracking = Tracking(store.mlflow_uri, store.mlflow_artifacts)
    _register(store, tracking)
    archive = store.checkpoint("oasst1") / "version" / MODEL_FILE
    tags = {"job": "oasst1", "archive": str(archive)}
    tracking.client().create_model_version("fedsft-tiny", archive.as_uri(), tags=tags)  # as earlier versions did
    return store.home


def _environment(home: Path, uri: str | None = None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    return {**kept, "FEDSFT_HOME": str(home), **({"MLFLOW_TRACKING_URI": uri} if uri else {})}


@contextmanager
def _served(home: Path, *arguments: str, uri: str | None = None) -> Iterator[str]:
    """The line that asks `fedsft serve`, once it is answered. Stopped with Ctrl-C; no process of it may be left."""
    command = [sys.executable, "-m", "fedsft_assets.cli", "serve", *arguments]
    processes = []
    with subprocess.Popen(command, env=_environment(home, uri), stdout=subprocess.PIPE, text=True) as serving:
        try:
            assert serving.stdout is not None
            assert serving.stdout.readline() == "fedsft-tiny version 1, of job fedavg\n"
            line = serving.stdout.readline()
            assert line.startswith("curl "), line
            until(lambda: _answers(line) or serving.poll() is not None, "the model is served")
            processes = psutil.Process(serving.pid).children(recursive=True)
            yield line
        finally:
            serving.send_signal(signal.SIGINT)
    assert serving.returncode == 0
    psutil.wait_procs(processes, timeout=30)
    assert processes
    assert [process for process in processes if process.is_running()] == []


def _answers(line: str) -> bool:
    """Whether the model's address answers, to anybody."""
    try:
        urllib.request.urlopen(line.split()[2].replace("invocations", "ping"))
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _asked_by(line: str) -> str:
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout


def _generated(home: Path) -> str:
    command = [sys.executable, "-m", "fedsft_assets.cli.generate", "--checkpoint"]
    archive = home / "checkpoints/fedavg/version/model.nemo"
    prompt = "What is the capital of Norway?"
    done = subprocess.run(
        [*command, str(archive), "--prompt", prompt], env=_environment(home), capture_output=True, text=True, check=True
    )
    return done.stdout.removesuffix("\n")


def test_printed_line_gets_the_answer_of_the_command_and_nobody_without_the_token_does(home: Path) -> None:
    port = unused_port()
    with _served(home, "fedavg", "--port", str(port)) as line:
        assert f"http://127.0.0.1:{port}/invocations" in line
        assert json.loads(_asked_by(line)) == {"predictions": [_generated(home)]}
        without = line.partition("-H @-")[0] + '-d \'{"inputs": ["x"]}\''
        assert _asked_by(without) == NO_TOKEN


def test_model_of_a_server_is_downloaded_and_the_copy_removed_at_the_end(
    store: Store,
    running_server: TrackingServer,  # noqa: F811
) -> None:
    tracking = Tracking(running_server.url)
    _register(store, tracking)
    tracking.client().set_registered_model_alias("fedsft-tiny", "champion", "1")
    with _served(store.home, uri=running_server.url) as line:
        assert len(list((store.home / "cache").glob(".served_model*/**/model.nemo"))) == 1
        assert json.loads(_asked_by(line)) == {"predictions": [_generated(store.home)]}
    assert list((store.home / "cache").glob(".served_model*")) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "has no version with the alias 'champion'"),
        (("dolly",), "no version of job 'dolly'; it has versions of fedavg, oasst1"),
        (("oasst1",), "fedsft-tiny version 2: was registered by an earlier version of fedsft"),
        (("fedavg", "--port", "99999"), "--port: 99999 cannot be used"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(home: Path, arguments: tuple[str, ...], says: str) -> None:
    command = [sys.executable, "-m", "fedsft_assets.cli", "serve", *arguments]
    done = subprocess.run(command, env=_environment(home), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
