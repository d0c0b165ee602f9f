"""A job in a POC that is cancelled in the user interface, by the mutation that its button sends."""

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from fedsft_assets.federation.runtimes.poc.runtime import Poc
from fedsft_assets.federation.runtimes.poc.system import PocSystem
from fedsft_assets.federation.runtimes.processes import MARK, marked_processes, stop_marked
from fedsft_assets.federation.supervisor.workspace import Workspaces
from fedsft_assets.process_env import home_environment
from fedsft_assets.settings import PROJECT, Settings
from fedsft_assets.specs.runtime import PocSettings
from fedsft_assets.store import Store
from fedsft_assets.tracking import Tracking

pytestmark = pytest.mark.slow

_LONGEST_WAIT = 240.0


_READY = "{ repositoriesOrError { ... on RepositoryConnection { nodes { name location { name } } } } }"
_LAUNCH = """
mutation ($params: ExecutionParams!) {
  launchRun(executionParams: $params) { ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } }
}
"""
_TERMINATE = """
mutation ($ids: [String!]!) {
  terminateRuns(runIds: $ids, terminatePolicy: SAFE_TERMINATE) {
    ... on TerminateRunsResult { terminateRunResults { __typename } }
  }
}
"""


class WebServer:
    """Dagster's, as the pages in a browser talk to it."""

    def __init__(self, link: str) -> None:
        parts = urllib.parse.urlsplit(link)
        self._url = f"http://{parts.netloc}/graphql"
        self._token = urllib.parse.parse_qs(parts.query)["token"][0]

    def ask(self, query: str, **variables: object) -> dict[str, Any]:
        content = json.dumps({"query": query, "variables": variables}).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._token}"}
        request = urllib.request.Request(self._url, content, headers)
        with urllib.request.urlopen(request, timeout=_LONGEST_WAIT) as answer:
            said: dict[str, Any] = json.load(answer)
        assert "errors" not in said, said
        return dict(said["data"])

    def is_ready(self) -> bool:
        with contextlib.suppress(OSError):
            return bool(self.ask(_READY)["repositoriesOrError"].get("nodes"))
        return False

    def materialize(self, *key: str) -> str:
        """Begin a Dagster run of that asset alone; gives its id."""
        (repository,) = self.ask(_READY)["repositoriesOrError"]["nodes"]
        selector = {
            "repositoryLocationName": repository["location"]["name"],
            "repositoryName": repository["name"],
            "jobName": "__ASSET_JOB",
            "assetSelection": [{"path": list(key)}],
            "assetCheckSelection": [],
        }
        launched = self.ask(_LAUNCH, params={"selector": selector, "mode": "default", "runConfigData": {}})
        return str(launched["launchRun"]["run"]["runId"])

    def terminate(self, run_id: str) -> None:
        (result,) = self.ask(_TERMINATE, ids=[run_id])["terminateRuns"]["terminateRunResults"]
        assert result["__typename"] == "TerminateRunSuccess"


@pytest.fixture
def ui(store: Store) -> Iterator[WebServer]:
    """The user interface over the test's home, where jobs run in a POC of its own."""
    settings = Settings(home=store.home)
    mark = f"test {store.home}"
    own = {"FEDSFT_RUNTIME": "poc", "MLFLOW_TRACKING_URI": store.mlflow_uri, MARK: mark}
    process = subprocess.Popen(
        [sys.executable, "-m", "fedsft_assets.cli", "ui"],
        env={**os.environ, **home_environment(settings.home), **own},
        stdout=subprocess.PIPE,
        text=True,
        cwd=PROJECT,
    )
    try:
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if line.startswith("Dagster:"):
                break
        server = WebServer(said[-1].split()[-1])
        _until(server.is_ready, "the web server knows the code")
        yield server
    finally:
        stop_marked(mark)
        _poc(store).stop()


def _poc(store: Store) -> PocSystem:
    return PocSystem(store.home / "poc", PocSettings(), home_environment(store.home))


def _until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + _LONGEST_WAIT
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not in {_LONGEST_WAIT:.0f} s: {what}")
        time.sleep(0.2)


def test_job_in_a_poc_that_is_cancelled_in_the_ui_is_aborted_and_leaves_nothing_behind(
    store: Store, build: Callable[..., str], ui: WebServer, tmp_path: Path
) -> None:
    job = build("fedavg", rounds=500, max_local_steps=2, max_evaluation_records=8)
    workspaces, system = Workspaces(store.flare(job)), _poc(store)
    run_id = ui.materialize("checkpoint", job)
    _until(workspaces.latest, "the execution has begun")
    workspace = workspaces.latest()
    assert workspace is not None
    _until(lambda: workspace.journal.exists() and "train_loss" in workspace.journal.read_text(), "the job trains")
    execution = workspace.execution()
    assert execution is not None
    assert execution.job_id is not None
    flare_job = execution.job_id
    assert len(system.job_processes(flare_job)) >= 1 + 3 + 3  # of the server, of the sites, their trainers

    begun = time.monotonic()
    ui.terminate(run_id)
    _until(lambda: not system.job_processes(flare_job), "all processes of the FLARE job are gone")
    _until(lambda: not marked_processes(str(store.flare(job))), "the supervisor is gone")
    print(f"all processes are gone after {time.monotonic() - begun:.1f} s")

    with contextlib.closing(Poc(system, tmp_path / "flare")) as poc:
        assert poc.poll(flare_job).status == "FINISHED:ABORTED"
    with dg.DagsterInstance.from_config(str(store.home / "dagster")) as instance:
        _until(lambda: instance.get_run_by_id(run_id).is_finished, "the Dagster run has ended")  # type: ignore[union-attr]
        (run,) = instance.get_runs()
        assert run.status == dg.DagsterRunStatus.CANCELED
        assert not instance.event_log_storage.get_concurrency_info("gpu").active_slot_count
    client = Tracking(store.mlflow_uri).client()
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert [one.info.status for one in runs] == ["KILLED"] * 4
    assert system.status().state == "running"
