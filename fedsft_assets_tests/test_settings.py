"""Settings: defaults that work, environment variables that are checked, and nothing written outside FEDSFT_HOME."""

import base64
import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import dagster as dg
import pytest
from pydantic import ValidationError

from fedsft_assets.defs.resources import MLflowResource, resources
from fedsft_assets.process_env import home_environment
from fedsft_assets.settings import PROJECT, Settings
from fedsft_assets.specs.limits import CheckSettings, SplitSettings
from fedsft_assets.tracking import Tracking
from fedsft_assets.tracking.outbox import explained
from fedsft_assets_tests.watched import ENCODED, PASSWORD, USER


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("FEDSFT_", "MLFLOW_TRACKING_")):
            monkeypatch.delenv(name)
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards


def test_defaults_work_without_any_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert Settings().home == PROJECT / ".fedsft"
    monkeypatch.setenv("FEDSFT_HOME", str(tmp_path))  # that one may have been made for something else
    settings = Settings()
    assert settings.jobs == PROJECT / "jobs"
    assert (settings.data, settings.model, settings.runtime, settings.mlflow_uri) == (
        "sample",
        "tiny",
        "simulator",
        None,
    )
    assert Tracking.of(settings) == Tracking(settings.store.mlflow_uri, settings.store.mlflow_artifacts, patience=60)
    assert settings.source == "sample"
    assert settings.model_path is None
    assert settings.datasets == PROJECT / "datasets"
    assert settings.prompts == PROJECT / "fedsft_assets/evaluation/prompts.yaml"
    assert (settings.splits, settings.checks) == (SplitSettings(), CheckSettings())
    assert settings.store.home == settings.home


@pytest.mark.parametrize(
    ("given", "seeds"), [("1", []), ("3", [1234, 1235, 1236]), ("7,8, 9", [7, 8, 9]), ("5,", None), ("7,7", None)]
)
def test_seeds_are_a_number_or_a_list(monkeypatch: pytest.MonkeyPatch, given: str, seeds: list[int] | None) -> None:
    monkeypatch.setenv("FEDSFT_SEEDS", given)
    if seeds is None:
        with pytest.raises(ValidationError, match=r"has a seed twice|expected a number of seeds, as 3, or a list"):
            Settings()
    else:
        assert Settings().seeds == seeds


@pytest.mark.parametrize("given", ["0", "101", "-3", "many"])
def test_impossible_number_of_seeds_is_refused(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("FEDSFT_SEEDS", given)
    with pytest.raises(ValidationError, match=r"expected 1 to 100|expected a number of seeds"):
        Settings()


def test_environment_variables_are_read_anew_each_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, value in {
        "FEDSFT_HOME": "home",
        "FEDSFT_DATA": "data",
        "FEDSFT_MODEL": "smollm2-135m",
        "FEDSFT_MODEL_PATH": "gpt.nemo",
        "FEDSFT_JOBS": "~/jobs",
        "FEDSFT_PROMPTS": "prompts.yaml",
        "MLFLOW_TRACKING_URI": "http://tracking:5000",
        "FEDSFT_TRACKING_PATIENCE": "2.5",
        "HOME": str(tmp_path / "me"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    settings = Settings()
    assert settings.home == tmp_path / "home"
    assert settings.source == str(tmp_path / "data")
    assert settings.jobs == tmp_path / "me" / "jobs"
    assert settings.prompts == tmp_path / "prompts.yaml"
    assert (settings.model, settings.mlflow_uri) == ("smollm2-135m", "http://tracking:5000")
    assert Tracking.of(settings) == Tracking("http://tracking:5000", None, patience=2.5)
    assert settings.model_path == tmp_path / "gpt.nemo"


def test_how_records_are_split_and_checked_can_be_set_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "FEDSFT_SPLITS__PROPORTIONS": "[0.9, 0.05, 0.05]",
        "FEDSFT_SPLITS__MAX_REJECTED": "0.2",
        "FEDSFT_CHECKS__LANGUAGES": '["en", "de"]',
        "FEDSFT_CHECKS__SEVERITY": '{"duplicates": "error"}',
    }.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.splits == SplitSettings(proportions=(0.9, 0.05, 0.05), max_rejected=0.2)
    assert settings.checks == CheckSettings(languages=["en", "de"], severity={"duplicates": "error"})


@pytest.mark.parametrize("proportions", ["[0.8, 0.1, 0.2]", "[1.0, 0.0, 0.0]", "[0.5, 0.5]"])
def test_impossible_proportions_are_refused(monkeypatch: pytest.MonkeyPatch, proportions: str) -> None:
    monkeypatch.setenv("FEDSFT_SPLITS__PROPORTIONS", proportions)
    with pytest.raises(ValidationError, match=r"splits\n?.*|proportions"):
        Settings()


def test_data_that_is_no_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDSFT_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(
        ValueError, match=f"FEDSFT_DATA: '{tmp_path}/nowhere' is neither 'sample' nor 'hub' nor a folder"
    ):
        _ = Settings().source


def test_unknown_runtime_is_refused_with_those_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDSFT_RUNTIME", "cloud")
    with pytest.raises(ValidationError, match=r"runtime\n.*'simulator'.*'cloud'"):
        Settings()


def test_libraries_write_under_home_only(tmp_path: Path) -> None:
    environment = home_environment(tmp_path)
    places = {name: Path(value) for name, value in environment.items() if value.startswith("/")}
    assert {"FEDSFT_HOME", "DAGSTER_HOME", "MPLCONFIGDIR", "HF_HOME", "XDG_CACHE_HOME"} <= places.keys()
    assert all(place.is_relative_to(tmp_path) for place in places.values())


def test_runtimes_are_set_up_by_variables_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {
        "FEDSFT_RUNTIME": "poc",
        "FEDSFT_POC__GPUS": "0, 1",
        "FEDSFT_POC__THREADS": "2",
        "FEDSFT_PRODUCTION__STARTUP_KIT": "kit",
        "FEDSFT_PRODUCTION__STUDY": "cancer",
        "FEDSFT_PRODUCTION__TIMEOUTS__ABORT": "20",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    settings = Settings()
    assert settings.runtime == "poc"
    assert (settings.poc.gpu_ids, settings.poc.threads) == ([0, 1], 2)
    assert (settings.production.startup_kit, settings.production.study) == (tmp_path / "kit", "cancer")
    assert settings.production.timeouts.abort == 20


@pytest.mark.parametrize(
    ("name", "value"),
    [("FEDSFT_RUNTIME", "cloud"), ("FEDSFT_POC__GPUS", "all"), ("FEDSFT_PRODUCTION__TIMEOUTS__ABORT", "0")],
)
def test_wrong_value_for_a_runtime_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError):
        Settings()


@pytest.mark.parametrize(
    "name", ["a?b", "what?", "100%41", "%c3%a4", "x%3Fy/z", "two\nlines", "bell\x07", "latin \udce4"]
)
def test_home_that_sqlite_cannot_open_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValidationError, match=r"home\n.*SQLite URLs cannot represent.*set FEDSFT_HOME to a folder"):
        Settings(home=tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_home_with_any_other_character_can_be_tracked(tmp_path: Path, empty_mlflow_database: Path) -> None:
    """All printable ASCII characters, and some others, each in one path: MLflow's store and its artifacts."""
    printable = "".join(map(chr, range(32, 127)))
    name = printable.replace("/", "").replace("?", "").replace("%", "%%") + "äß日😀\u00a0"
    settings = Settings(home=tmp_path / name)
    settings.home.mkdir()
    shutil.copyfile(empty_mlflow_database, settings.home / "mlflow.db")
    client, experiment = Tracking.of(settings).client(), Tracking.of(settings).experiment_id()
    run = client.create_run(experiment)
    client.log_text(run.info.run_id, "content", "file.txt")
    assert Path(client.download_artifacts(run.info.run_id, "file.txt")).read_text() == "content"
    assert (settings.home / "mlartifacts" / run.info.run_id / "artifacts/file.txt").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_account_that_the_password_file_does_not_know_gets_what_libraries_ask_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not {"HOME", "USER"} & home_environment(tmp_path).keys()
    for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 4_000_000)
    environment = home_environment(tmp_path)
    assert (environment["HOME"], environment["USER"]) == (str(tmp_path / "cache"), "uid-4000000")


def test_password_of_a_tracking_server_goes_where_mlflow_alone_looks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{USER}:{ENCODED}@tracking:5000/mlflow")
    settings = Settings()
    assert settings.mlflow_uri == Tracking.of(settings).uri == "http://tracking:5000/mlflow"
    assert os.environ["MLFLOW_TRACKING_URI"] == "http://tracking:5000/mlflow"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == USER
    assert os.environ["MLFLOW_TRACKING_PASSWORD"] == PASSWORD
    shown = [
        repr(settings),
        settings.model_dump_json(),
        repr(Tracking.of(settings)),
        str(home_environment(settings.home)),
    ]
    assert not any(word in text for word in (PASSWORD, ENCODED, USER) for text in shown)
    assert Tracking.of(Settings()) == Tracking.of(settings)


def test_password_of_a_database_is_told_to_mlflow_and_to_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"postgresql://{USER}:{ENCODED}@db:5432/mlflow?sslmode=require"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    tracking = Tracking.of(Settings())
    assert tracking.uri == "postgresql://db:5432/mlflow?sslmode=require"
    asked: list[str] = []
    monkeypatch.setattr("mlflow.MlflowClient", lambda **said: asked.append(said["tracking_uri"]))
    tracking.client()
    assert asked == [uri]


def test_resources_show_no_secret_and_take_one_by_the_name_of_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{USER}:{ENCODED}@tracking:5000")
    monkeypatch.setenv("OTHER_SERVER", f"http://other-user:{ENCODED}@other:5000")
    given = resources(Settings(), ["site-1"])
    shown = json.dumps({name: resource.model_dump(mode="json") for name, resource in given.items()}, default=str)
    assert "http://tracking:5000" in shown
    assert not any(word in shown for word in (PASSWORD, ENCODED, USER))
    mlflow = MLflowResource(uri=dg.EnvVar("OTHER_SERVER"))
    assert "OTHER_SERVER" in repr(mlflow)
    assert ENCODED not in repr(mlflow)
    assert mlflow.process_config_and_initialize().tracking.uri == "http://other:5000"
    assert os.environ["MLFLOW_TRACKING_USERNAME"] == "other-user"


def test_what_mlflow_says_has_no_password(monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = Tracking(f"unknown+driver://{USER}:{ENCODED}@db/x?password={ENCODED}")
    with pytest.raises(Exception, match=r".") as error:
        tracking.experiment_id()
    chain = [error.value, error.value.__cause__, error.value.__context__]
    assert not any(word in repr(one) for word in (PASSWORD, ENCODED, USER) for one in chain)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    assert explained(ValueError(f"with {PASSWORD} at http://{USER}:{ENCODED}@host")) == "with *** at http://***@host"


def test_server_is_asked_with_the_password_that_was_in_its_url(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[str, str]] = []

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append((self.path, self.headers.get("Authorization", "")))
            self.send_response(401)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{USER}:{ENCODED}@127.0.0.1:{server.server_port}")
        with pytest.raises(Exception, match="401") as error:
            Tracking.of(Settings()).experiment_id()
        server.shutdown()
    assert heard
    assert all("get-by-name" in path for path, _ in heard)
    assert {base64.b64decode(said.removeprefix("Basic ")).decode() for _, said in heard} == {f"{USER}:{PASSWORD}"}
    assert not any(word in str(error.value) for word in (PASSWORD, ENCODED, USER))
