"""Studies in homes, clones and accounts that are not the usual ones, from the command line as a person has it."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from fedsft_assets.federation.runtimes.processes import MARK, marked_processes
from fedsft_assets.settings import PROJECT, Settings
from fedsft_assets.store import Store
from fedsft_assets.tracking import Tracking
from fedsft_assets_tests.environments import environment_of, installing

pytestmark = pytest.mark.slow

# All in one path that a command line is split at, or that a shell, make or a URL makes something else of.
SPECIAL = "a b'c\"d$HOME;e#f&g|h*i`j`k\\l(m)<n>%z ü日"
USER = 4_000_000  # whom no password file knows
QUICK = "description: a quick job\nsites:\n{sites}rounds: 1\nmax_local_steps: 2\nmax_evaluation_records: 8\n"


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    """A folder of two quick jobs."""
    folder = tmp_path / f"jobs {SPECIAL}"
    folder.mkdir()
    for name, datasets in {"one": ["alpaca"], "two": ["alpaca", "dolly"]}.items():
        sites = "".join(f"  site-{k}: {{dataset: {dataset}}}\n" for k, dataset in enumerate(datasets, 1))
        (folder / f"{name}.yaml").write_text(QUICK.format(sites=sites))
    return folder


def _fedsft(
    *arguments: str,
    mark: str,
    project: Path = PROJECT,
    python: Sequence[str] = (sys.executable,),
    **variables: str,
) -> "subprocess.CompletedProcess[str]":
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FEDSFT_", "MLFLOW_"))}
    return subprocess.run(
        [*python, "-m", "fedsft_assets.cli", *arguments],
        env={**kept, MARK: mark, **variables},
        cwd=project,
        capture_output=True,
        text=True,
        check=False,
    )


def _runs(home: Path) -> dict[str, list[str]]:
    """The MLflow runs of jobs, with their artifacts, each loaded."""
    client = Tracking(Store(home).mlflow_uri).client()
    experiment = client.get_experiment_by_name("fedsft")
    found: dict[str, list[str]] = {}
    for run in client.search_runs([experiment.experiment_id], "tags.checkpoint.path LIKE '%'"):
        artifacts = [file.path for file in client.list_artifacts(run.info.run_id)]
        for artifact in artifacts:
            assert Path(client.download_artifacts(run.info.run_id, artifact)).stat().st_size
        assert Path(run.data.tags["checkpoint.path"]).is_relative_to(home)
        assert Path(run.data.tags["checkpoint.path"]).is_file()
        found.setdefault(run.info.run_name, []).extend(artifacts)
    return found


@pytest.mark.long
def test_home_can_be_anywhere_and_be_moved_and_goes_on_as_what_it_was(tmp_path: Path, jobs: Path, mark: str) -> None:
    home, moved = tmp_path / f"{SPECIAL}:o", tmp_path / f"moved {SPECIAL[::-1]}"
    first = _fedsft("study", mark=mark, FEDSFT_HOME=str(home), FEDSFT_JOBS=str(jobs))
    assert first.returncode == 0, first.stderr[-4000:]
    assert sorted(_runs(home)) == ["one", "two"]

    other = _fedsft("study", "--model", "smollm2-135m", mark=mark, FEDSFT_HOME=str(home))
    assert other.returncode == 1
    (said,) = other.stderr.splitlines()
    assert f"FEDSFT_HOME={shlex.quote(f'{home}-2')} FEDSFT_JOBS={shlex.quote(str(jobs))} fedsft study" in said

    home.rename(moved)
    again = _fedsft("study", mark=mark, FEDSFT_HOME=str(moved))
    assert again.returncode == 0, again.stderr[-4000:]
    assert again.stdout.startswith(f"this home was moved from {home} to {moved}; ")
    runs = _runs(moved)
    assert sorted(runs) == ["one", "two"]
    assert all(artifacts.count("checkpoint.json") == 2 for artifacts in runs.values())
    assert all(version.source.startswith(moved.as_uri()) for version in _versions(moved))
    assert marked_processes(mark) == []


def _versions(home: Path) -> list[object]:
    return list(Tracking(Store(home).mlflow_uri).client().search_model_versions())


@pytest.mark.parametrize("runtime", ["simulator", pytest.param("poc", marks=pytest.mark.long)])
def test_clone_can_be_anywhere(tmp_path: Path, mark: str, runtime: str) -> None:
    clone = tmp_path / SPECIAL.replace("%", "")
    clone.mkdir()
    for name in ("fedsft_assets", "datasets", "pyproject.toml", "dagster.yaml", "workspace.yaml"):
        source = PROJECT / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, clone / name)  # type: ignore[operator]
    (clone / "jobs").mkdir()
    (clone / "jobs" / "one.yaml").write_text(QUICK.format(sites="  site-1: {dataset: alpaca}\n"))
    python = environment_of(installing("study"), clone / ".venv") / "python3"
    (package,) = (clone / ".venv").glob("lib/python*/site-packages/fedsft_assets")
    package.unlink()
    package.symlink_to(clone / "fedsft_assets")
    try:
        done = _fedsft("study", mark=mark, project=clone, python=[str(python)], FEDSFT_RUNTIME=runtime, PYTHONPATH="")
        assert done.returncode == 0, done.stderr[-4000:]
        assert list(_runs(clone / ".fedsft")) == ["one"]
        assert json.loads((clone / ".fedsft" / "home.json").read_text())["jobs"] == "<project>/jobs"
    finally:
        _fedsft("poc", "stop", mark=mark, project=clone, python=[str(python)], PYTHONPATH="")


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_account_that_the_password_file_does_not_know_delivers_to_mlflow(tmp_path: Path, jobs: Path, mark: str) -> None:
    (jobs / "two.yaml").unlink()
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, USER, USER)
    # It may read everything, so that it finds this Python wherever that is, and write nothing but its own.
    as_user = ["setpriv", "--reuid", str(USER), "--regid", str(USER), "--clear-groups"]
    may_read = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    without = ["env", *(f"--unset={name}" for name in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME"))]
    python = [*as_user, *may_read, *without, sys.executable]
    done = _fedsft("study", mark=mark, python=python, FEDSFT_HOME=str(home), FEDSFT_JOBS=str(jobs))
    assert done.returncode == 0, done.stderr[-4000:]
    assert list(_runs(home)) == ["one"]
    assert {path.lstat().st_uid for path in home.rglob("*")} == {USER}


def test_home_that_cannot_be_opened_is_refused_before_anything_is_written(tmp_path: Path, mark: str) -> None:
    for command in ("study", "ui", "track", "tensorboard"):
        refused = _fedsft(command, mark=mark, FEDSFT_HOME=str(tmp_path / "what?"))
        assert refused.returncode == 1
        (said,) = refused.stderr.splitlines()
        assert said.startswith(f"FEDSFT_HOME: {tmp_path / 'what?'} contains '?', which SQLite URLs cannot represent")
    assert list(tmp_path.iterdir()) == []


def test_another_purpose_is_refused_by_the_code_location_too(tmp_path: Path, jobs: Path, mark: str) -> None:
    """As the daemon and the web server load it, whoever started them."""
    home = tmp_path / "home"
    (home / "raw").mkdir(parents=True)
    (home / "home.json").write_text(json.dumps({"place": str(home), **Settings(home=home).usual}))
    loading = [sys.executable, "-c", "import fedsft_assets.definitions"]
    environment = {**os.environ, MARK: mark, "FEDSFT_HOME": str(home)}
    assert subprocess.run(loading, cwd=PROJECT, env=environment, check=False).returncode == 0
    environment["FEDSFT_JOBS"] = str(jobs)
    refused = subprocess.run(loading, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    assert f"fedsft_assets.home_file.HomeError: {home / 'home.json'}: this home is for data sample" in refused.stderr
