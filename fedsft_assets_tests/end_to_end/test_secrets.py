"""A study as a user starts it who has secrets in his environment and lets everybody read by his umask: what others see.

Looked at are the command lines and environments of all processes while it runs, every byte of the home afterwards,
Dagster's and MLflow's databases among them, the terminal, and the modes of all that is left.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedsft_assets.federation.runtimes.processes import MARK, marked_processes
from fedsft_assets.settings import PROJECT
from fedsft_assets.store import HOME_FOLDERS
from fedsft_assets_tests.watched import ENCODED, PLANTED, USER, WORDS, Seen, holding, open_to_others, watching

pytestmark = pytest.mark.slow

JOB = "description: a quick job\nsites:\n  site-1: {dataset: alpaca}\nrounds: 1\nmax_local_steps: 2\n"
# Whose processes there are, by a word of their command lines.
SITES = {
    "simulator": ["fedsft_assets.federation.runtimes.simulator.runtime", "fedsft_assets.federation.site.process"],
    "poc": [
        "nvflare.private.fed.app.server.server_train",
        "nvflare.private.fed.app.client.client_train",
        "nvflare.private.fed.app.server.runner_process",
        "nvflare.private.fed.app.client.worker_process",
        "fedsft_assets.federation.site.process",
    ],
}


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every account may enter and write to, as `/tmp` is."""
    with tempfile.TemporaryDirectory(prefix="fedsft-") as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


def _run(*arguments: str, environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "fedsft_assets.cli", *arguments]
    return subprocess.run(
        command, env=environment, cwd=PROJECT, umask=0, capture_output=True, text=True, check=False, timeout=3000
    )


def _is_given_nothing(seen: Seen, mark: str) -> None:
    """None of the processes has a secret in its command line, and none but the study's own in its environment."""
    for (_, command), environment in seen.processes.items():
        assert not [word for word in [*WORDS, USER] if word in command]
        if not environment[MARK].startswith(mark):  # it is of the job, or of the POC
            values = "\n".join(environment.values())
            assert not [word for word in [*WORDS, USER] if word in values], command
            assert not environment.keys() & PLANTED.keys(), command


@pytest.mark.parametrize("runtime", ["simulator", "poc"])
def test_secrets_stay_with_the_study_and_files_with_their_owner(
    tmp_path: Path, place: Path, mark: str, runtime: str
) -> None:
    home, temporary, jobs = place / "home", place / "tmp", tmp_path / "jobs"
    for folder in (temporary, jobs):
        folder.mkdir()
    temporary.chmod(0o777)
    (jobs / "quick.yaml").write_text(JOB)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FEDSFT_", "MLFLOW_"))}
    environment = {
        **kept,
        **PLANTED,
        MARK: mark,
        "TMPDIR": str(temporary),
        "NO_PROXY": "127.0.0.1,localhost",
        "FEDSFT_HOME": str(home),
        "FEDSFT_JOBS": str(jobs),
        "FEDSFT_RUNTIME": runtime,
        "FEDSFT_TRACKING_PATIENCE": "1",
        # Where nobody answers: that is when most is said.
        "MLFLOW_TRACKING_URI": f"http://{USER}:{ENCODED}@127.0.0.1:9/?password={ENCODED}",
    }

    def concerns(of_process: "os._Environ[str] | dict[str, str]") -> bool:
        return of_process.get(MARK, "").startswith(mark) or str(home) in of_process.get(MARK, "")

    overrides = ["--max-evaluation-records", "4"]
    try:
        with watching(concerns, [home, temporary]) as seen:  # type: ignore[arg-type]
            done = _run("study", *overrides, environment=environment)
        assert done.returncode == 0, done.stderr[-4000:]
        track = _run("track", environment=environment)
    finally:
        stopped = _run("poc", "stop", environment=environment) if runtime == "poc" else None
    assert track.returncode == 1
    said = [text for one in (done, track, stopped) if one for text in (one.stdout, one.stderr)]
    assert "http://127.0.0.1:9" in done.stdout + track.stderr  # it is told, if not what opens it
    assert not [word for word in [*WORDS, USER] for text in said if word in text]
    assert holding(home, [*WORDS, USER]) == {}
    assert holding(temporary, [*WORDS, USER]) == {}

    for word in ["fedsft_assets.federation.supervisor.supervisor", *SITES[runtime]]:
        assert seen.of(word), word
    _is_given_nothing(seen, mark)

    # NVFlare's provisioning has its scripts, which are the same for everybody, so for a moment, in a closed folder.
    assert {path for path in seen.open if path.suffix != ".sh"} == set()
    assert open_to_others(home) == []
    assert {path.name for path in home.iterdir() if path.is_dir()} <= set(HOME_FOLDERS)
    if os.geteuid() == 0:
        as_another = ["setpriv", "--reuid=4000000", "--regid=4000000", "--clear-groups", "find", str(place)]
        found = subprocess.run([*as_another, "-readable"], capture_output=True, text=True, check=False).stdout
        assert set(found.splitlines()) <= {str(place), str(temporary)}
    assert marked_processes(mark) == []
    assert not [process for process in psutil.process_iter() if str(home) in _mark_of(process)]


def _mark_of(process: psutil.Process) -> str:
    try:
        return process.environ().get(MARK, "")
    except psutil.Error:
        return ""
