"""Settings: defaults that work, environment variables that are checked, and nothing written outside FEDSFT_HOME."""

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from fedsft_assets.settings import PROJECT, Settings
from fedsft_assets.specs import CheckSettings, SplitSettings
from fedsft_assets.tracking import Tracking


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("FEDSFT_") or name == "MLFLOW_TRACKING_URI":
            monkeypatch.delenv(name)


def test_defaults_work_without_any_variable() -> None:
    settings = Settings()
    assert settings.home == PROJECT / ".fedsft"
    assert settings.jobs == PROJECT / "jobs"
    assert (settings.data, settings.model, settings.runtime, settings.mlflow_uri) == (
        "sample",
        "tiny",
        "simulator",
        None,
    )
    assert settings.tracking == Tracking(settings.store.mlflow_uri, settings.store.mlflow_artifacts, patience=60)
    assert settings.source == "sample"
    assert settings.model_path is None
    assert settings.datasets == PROJECT / "datasets"
    assert settings.prompts == PROJECT / "fedsft_assets/evaluation/prompts.yaml"
    assert (settings.splits, settings.checks) == (SplitSettings(), CheckSettings())
    assert settings.store.home == settings.home


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
    assert settings.tracking == Tracking("http://tracking:5000", None, patience=2.5)
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
    environment = Settings(home=tmp_path).environment()
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
