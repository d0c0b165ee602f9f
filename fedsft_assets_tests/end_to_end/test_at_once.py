"""Executions at the same time over one home: each trains on what it was started with, and none disturbs another."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsft_assets.store import Store
from fedsft_assets.tracking import Tracking
from fedsft_assets.tracking.delivery import EXECUTION_TAG
from fedsft_assets.versions import current

pytestmark = pytest.mark.slow

_EXECUTE = """
import json, logging, sys
from logging.handlers import BufferingHandler
from pathlib import Path
from fedsft_assets.execution import execute_job
from fedsft_assets.store import Store
from fedsft_assets.tracking import Tracking
from fedsft_assets_tests.prepared import TINY
store, said = Store(Path(sys.argv[1])), BufferingHandler(10**9)
logging.getLogger("fedsft_assets").addHandler(said)
logging.getLogger("fedsft_assets").setLevel("INFO")
tracking = Tracking(store.mlflow_uri, store.mlflow_artifacts)
executed = execute_job(Path(sys.argv[2]), store, TINY, tracking, {})
report = executed.report
lines = [record.getMessage() for record in said.buffer]
print(json.dumps([report.checkpoint_digest, report.val_loss, report.test_loss, lines]))
"""


def _start(store: Store, job_folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", _EXECUTE, str(store.home), str(job_folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _result(process: "subprocess.Popen[str]") -> tuple[list[object], list[str]]:
    """What the execution came to, and what it said."""
    out, _ = process.communicate()
    assert process.returncode == 0, out
    *result, said = json.loads(out.splitlines()[-1])
    return result, said


def test_two_job_folders_of_one_job_at_once_give_what_each_gives_alone(store: Store, build: Callable[..., str]) -> None:
    folders = []
    for rate in (0.001, 0.002):
        job = build("alpaca", rounds=2, max_local_steps=3, max_evaluation_records=20, learning_rate=rate)
        folders.append(current(store.job_folder(job)))
    at_once = [_start(store, folder) for folder in folders]
    together = [_result(process)[0] for process in at_once]
    alone = [_result(_start(store, folder))[0] for folder in folders]
    assert together == alone
    assert together[0] != together[1]
    client = Tracking(store.mlflow_uri).client()
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert len({run.data.tags[EXECUTION_TAG] for run in runs}) == 4
    assert {run.info.status for run in runs} == {"FINISHED"}


def test_the_same_job_folder_twice_at_once_is_executed_one_after_the_other(
    store: Store, build: Callable[..., str]
) -> None:
    job = build("alpaca", rounds=2, max_local_steps=3, max_evaluation_records=20)
    folder = current(store.job_folder(job))
    (first, said_first), (second, said_second) = map(_result, [_start(store, folder), _start(store, folder)])
    assert first == second
    waits = "waiting for another run of the same job with the same inputs"
    assert [waits in said_first, waits in said_second].count(True) == 1
