"""Registered versions are models that load and are served, where fedsft is not installed too."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.models import Model

from fedsft_assets.federation.protocol.job_report import MODEL_FILE
from fedsft_assets.model.archive.nemo_archive import content_digest
from fedsft_assets.store import Store
from fedsft_assets.tracking import Registered, Tracking
from fedsft_assets.tracking.model_folder import pinned_requirements
from fedsft_assets.tracking.model_loader import ARCHIVE, REFERENCE
from fedsft_assets.versions import current
from fedsft_assets_tests.environments import environment_of
from fedsft_assets_tests.prepared import prepare_home
from fedsft_assets_tests.tracking.examples import REPORT, track, until
from fedsft_assets_tests.tracking.server import HOST, TrackingServer, unused_port

pytestmark = pytest.mark.slow

PROMPTS = ["What is the capital of Norway?", "Name two colours."]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real archive, in a version of a checkpoint."""
    store = prepare_home(tmp_path_factory.mktemp("home"))
    folder = store.checkpoint("fedavg") / "version"
    folder.mkdir(parents=True)
    archive = shutil.copyfile(next(current(store.base_model("tiny")).glob("*.nemo")), folder / MODEL_FILE)
    replace(REPORT, checkpoint_digest=content_digest(archive)).write(folder)
    return folder


@pytest.fixture(scope="module")
def answers(trained: Path) -> list[str]:
    """What `fedsft-generate` says to each prompt."""
    command = [sys.executable, "-m", "fedsft_assets.cli.generate", "--checkpoint", str(trained), "--prompt"]
    environment = {**os.environ, "FEDSFT_HOME": str(trained.parent)}
    said = [
        subprocess.run([*command, prompt], env=environment, capture_output=True, text=True, check=True).stdout
        for prompt in PROMPTS
    ]
    assert all(said)
    return [text.removesuffix("\n") for text in said]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with nothing but a model's requirements."""
    return environment_of(pinned_requirements(), tmp_path_factory.mktemp("environment"), with_project=False)


@pytest.fixture(params=["local", "server"])
def registered_at(request: pytest.FixtureRequest, trained: Path, store: Store) -> Tracking:
    """A store or a server that has the checkpoint as version 1, with the alias `champion`."""
    if request.param == "local":
        tracking = request.getfixturevalue("tracking")
    else:
        tracking = Tracking(request.getfixturevalue("running_server").url)
    _register(tracking, store, trained)
    tracking.client().set_registered_model_alias("fedsft-tiny", "champion", "1")
    return tracking


def _register(tracking: Tracking, store: Store, checkpoint: Path) -> Registered:
    report = replace(
        REPORT, checkpoint_digest=json.loads((checkpoint / "report.json").read_text())["checkpoint_digest"]
    )
    with track(tracking, store) as job:
        registered = job.finish(report, checkpoint, [], model="fedsft-tiny", data="d" * 64)
    assert registered.version
    return registered


def _load(tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", tracking.uri)
    return mlflow.pyfunc.load_model("models:/fedsft-tiny@champion")


def test_version_answers_what_the_command_answers(
    registered_at: Tracking, answers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _load(registered_at, monkeypatch)
    assert model.predict(PROMPTS) == answers
    (short,) = model.predict(PROMPTS[:1], params={"max_new_tokens": 2})
    assert short
    assert answers[0].startswith(short)
    assert len(short) < len(answers[0])
    sampled = [model.predict(PROMPTS[:1], params={"temperature": 2.0, "seed": seed}) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_version_loads_where_only_its_requirements_are_installed(
    registered_at: Tracking, answers: list[str], programs: Path, tmp_path: Path
) -> None:
    assert json.loads(_python(programs, tmp_path, registered_at, _ANSWER, json.dumps(PROMPTS))) == answers


_ANSWER = """
import json, sys
from importlib.util import find_spec
import mlflow
assert find_spec("fedsft_assets") is None
model = mlflow.pyfunc.load_model("models:/fedsft-tiny@champion")
print(json.dumps(model.predict(json.loads(sys.argv[1]))))
"""


def _python(programs: Path, folder: Path, tracking: Tracking, code: str, *arguments: str) -> str:
    command = [str(programs / "python3"), "-c", code, *arguments]
    return subprocess.run(
        command, cwd=folder, env=_environment(programs, tracking), stdout=subprocess.PIPE, text=True, check=True
    ).stdout


def _environment(programs: Path, tracking: Tracking) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("FEDSFT", "MLFLOW", "PY"))}
    path = f"{programs}{os.pathsep}{inherited['PATH']}"
    return {**inherited, "PATH": path, "MLFLOW_TRACKING_URI": tracking.uri, "MLFLOW_DISABLE_TELEMETRY": "true"}


def test_version_is_served_over_http_where_only_its_requirements_are_installed(
    registered_at: Tracking, answers: list[str], programs: Path, tmp_path: Path
) -> None:
    with _served(programs, registered_at, tmp_path) as url:
        request = urllib.request.Request(
            f"{url}/invocations", json.dumps({"inputs": PROMPTS}).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            assert json.load(answer) == {"predictions": answers}


@contextmanager
def _served(programs: Path, tracking: Tracking, folder: Path) -> Iterator[str]:
    """Address of `mlflow models serve`, whose processes are stopped at the end."""
    port = unused_port()
    command = [
        *(str(programs / "python3"), "-m", "mlflow", "models", "serve", "--model-uri", "models:/fedsft-tiny@champion"),
        *("--host", HOST, "--port", str(port), "--env-manager", "local"),
    ]
    with (folder / "server.log").open("w+") as log:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=_environment(programs, tracking),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            until(lambda: _pinged(port) or process.poll() is not None, "the model is served")
            assert process.poll() is None, (folder / "server.log").read_text()
            yield f"http://{HOST}:{port}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _pinged(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/ping") as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_version_describes_itself(
    registered_at: Tracking, trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", registered_at.uri)
    folder = Path(mlflow.artifacts.download_artifacts("models:/fedsft-tiny/1", dst_path=str(tmp_path / "model")))
    assert (folder / ARCHIVE).read_bytes() == (trained / MODEL_FILE).read_bytes()
    model = Model.load(folder)
    assert [str(column.type) for column in model.signature.inputs] == ["DataType.string"]
    assert model.load_input_example(str(folder)) == ["What is the capital of Norway?"]
    assert f"mlflow=={mlflow.__version__}" in (folder / "requirements.txt").read_text().splitlines()
    card = (folder / "README.md").read_text()
    assert "| test_loss | 2.25 |" in card
    assert "| learning_rate | 0.004 |" in card
    assert str(trained / MODEL_FILE) in card


def test_a_local_store_takes_no_further_space_for_the_archive(tracking: Tracking, store: Store, trained: Path) -> None:
    _register(tracking, store, trained)
    (linked,) = store.mlflow_artifacts.rglob(ARCHIVE)
    assert linked.samefile(trained / MODEL_FILE)


def test_archive_too_large_to_upload_is_referred_to(
    running_server: TrackingServer, store: Store, trained: Path, answers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = Tracking(running_server.url, largest_upload=1e-6)
    registered = _register(tracking, store, trained)
    client = tracking.client()
    client.set_registered_model_alias("fedsft-tiny", "champion", str(registered.version))
    (model,) = client.search_logged_models([tracking.experiment_id()])
    files = {file.path for file in client.list_logged_model_artifacts(model.model_id)}
    assert REFERENCE in files
    assert ARCHIVE not in files
    assert _load(tracking, monkeypatch).predict(PROMPTS) == answers
    away = (trained / MODEL_FILE).rename(trained / "away")
    try:
        with pytest.raises(FileNotFoundError, match="FEDSFT_LARGEST_UPLOAD"):
            _load(tracking, monkeypatch)
        (trained / MODEL_FILE).write_bytes(_other(trained, away))
        with pytest.raises(ValueError, match="is another archive than the registered one"):
            _load(tracking, monkeypatch)
    finally:
        away.replace(trained / MODEL_FILE)


def _other(folder: Path, archive: Path) -> bytes:
    """An archive with other weights."""
    from fedsft_assets.model.language_model import LanguageModel

    model = LanguageModel.load(archive)
    next(model.parameters()).data[0] += 1
    model.save(folder / "other.nemo")
    return (folder / "other.nemo").read_bytes()
