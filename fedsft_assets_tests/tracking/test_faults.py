"""A tracking server that is down, dies, is slow, or answers into the void: all arrives, once, and nobody waits."""

import signal
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.entities import LoggedModelStatus

from fedsft_assets.federation.protocol.points import Point
from fedsft_assets.store import Store
from fedsft_assets.tracking import EXPERIMENT, Outbox, Tracking, tracked_job
from fedsft_assets_tests.tracking.examples import (
    RESULTS,
    curve,
    expected,
    finish,
    job_points,
    runs,
    statuses,
    stored,
    track,
    tracking_record,
    until,
    write,
)
from fedsft_assets_tests.tracking.server import HOST, Proxy, TrackingServer, unused_port

pytestmark = pytest.mark.slow

CHANGES = ("create", "log-batch", "set-", "update", "PUT ", "PATCH ", "log-", "delete")


def _is_change(line: str) -> bool:
    return any(word in line for word in CHANGES)


def _assert_complete(tracking: Tracking, points: list[Point], status: str = "FINISHED") -> None:
    """All points, results and artifacts once, one MLflow run for each site and one for the job, one version."""
    assert stored(tracking) == expected(points)
    assert statuses(tracking) == dict.fromkeys(["fedavg", "fedavg site-1", "fedavg site-2"], status)
    if status != "FINISHED":
        return
    client = tracking.client()
    run = runs(tracking)["fedavg"]
    assert {name: len(client.get_metric_history(run.info.run_id, name)) for name in RESULTS} == dict.fromkeys(
        RESULTS, 1
    )
    assert {name: run.data.metrics[name] for name in RESULTS} == RESULTS
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["checkpoint.json", "report.json"]
    (version,) = client.search_model_versions("name = 'fedsft-tiny'")
    assert version.run_id == run.info.run_id
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert (model.source_run_id, model.status) == (run.info.run_id, LoggedModelStatus.READY)
    assert version.source == model.artifact_location
    assert {file.path for file in client.list_logged_model_artifacts(model.model_id)} >= {"MLmodel", "model.nemo"}
    assert [output.model_id for output in client.get_run(run.info.run_id).outputs.model_outputs] == [model.model_id]
    assert sorted(metric.key for metric in model.metrics) == sorted(RESULTS)


def test_server_that_is_down_at_the_start_gets_everything_when_it_is_up(
    server: TrackingServer, store: Store, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracking, points = Tracking(server.url), job_points()
    with track(tracking, store) as job:
        write(store, points[:10])
        until(lambda: caplog.messages, "a line about the server that is down")
        assert job.run_id is None
        server.start()
        write(store, points[10:])
        until(lambda: curve(tracking, "fedavg", "val_loss"), "points arrive while the job runs")
        registered = finish(job, checkpoint)
    run = runs(tracking)["fedavg"].info
    assert (registered.version, registered.run_id) == ("1", run.run_id)
    assert registered.run_url == f"{server.url}/#/experiments/{run.experiment_id}/runs/{run.run_id}"
    assert registered.version_url == f"{server.url}/#/models/fedsft-tiny/versions/1"
    (said,) = caplog.messages
    assert "training continues" in said
    _assert_complete(tracking, points)


def test_server_that_is_killed_in_the_middle_gets_everything_after_its_return(
    server: TrackingServer, store: Store, checkpoint: Path
) -> None:
    tracking, points = Tracking(server.url), job_points()
    server.start()
    with track(tracking, store) as job:
        write(store, points[:10])
        until(lambda: curve(tracking, "fedavg", "val_loss"), "points arrive")
        server.kill()
        write(store, points[10:])
        begun = threading.Thread(target=server.start)  # it comes back while the job waits for its end
        begun.start()
        finish(job, checkpoint)
        begun.join()
    _assert_complete(tracking, points)


def test_slow_server_gets_everything(running_server: TrackingServer, store: Store, checkpoint: Path) -> None:
    tracking, points = Tracking(running_server.url), job_points()
    with Proxy(running_server.port, lambda _: "late", delay=0.3) as proxy, track(Tracking(proxy.url), store) as job:
        write(store, points)
        assert finish(job, checkpoint).version == "1"
    _assert_complete(tracking, points)


def test_nothing_is_doubled_when_answers_are_lost(
    running_server: TrackingServer, store: Store, checkpoint: Path
) -> None:
    """Every change is served; of each kind of request the first, the fourth and so on are never answered."""
    tracking, points, seen = Tracking(running_server.url), job_points(), Counter[str]()

    def forward(line: str) -> str:
        seen[line] += 1
        return "drop" if _is_change(line) and seen[line] % 3 == 1 else "pass"

    with Proxy(running_server.port, forward) as proxy:
        with track(Tracking(proxy.url, patience=300), store) as job:
            write(store, points[:20])
            until(lambda: curve(tracking, "fedavg", "val_loss"), "points arrive")
            write(store, points[20:])
            assert finish(job, checkpoint).version == "1"
        dropped = {line.split()[1].split("?")[0] for line in proxy.requests if _is_change(line)}
    assert {"/api/2.0/mlflow/runs/create", "/api/2.0/mlflow/runs/log-batch"} <= dropped
    assert "/api/2.0/mlflow/model-versions/create" in dropped
    _assert_complete(tracking, points)


def test_nothing_is_doubled_when_requests_are_served_after_they_were_given_up(
    running_server: TrackingServer, store: Store, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first requests to make a run and to log a batch reach the server when others have taken their place."""
    monkeypatch.setattr(tracked_job, "ANSWER_SECONDS", 2)
    tracking, points, late = Tracking(running_server.url), job_points(), []

    def forward(line: str) -> str:
        if line.split()[1].endswith(("runs/create", "runs/log-batch")) and line not in late:
            late.append(line)
            return "late"
        return "pass"

    with Proxy(running_server.port, forward, delay=6.0) as proxy:
        with track(Tracking(proxy.url), store) as job:
            write(store, points[:20])
            until(lambda: len(proxy.served) == len(proxy.requests) and len(late) == 2, "late requests are served")
            write(store, points[20:])
            finish(job, checkpoint)
        creations = [line for line in proxy.served if "runs/create" in line]
    assert len(creations) == 4  # one too many, whose run is removed
    _assert_complete(tracking, points)


def test_upload_that_breaks_is_repeated_and_holds_nobody_up(
    running_server: TrackingServer, store: Store, checkpoint: Path
) -> None:
    """The archive is on its way when the job's patience ends, and its process does."""
    tracking, points = Tracking(running_server.url), job_points()

    def forward(line: str) -> str:
        return "hold" if line.startswith("PUT ") and "model.nemo" in line else "pass"

    with Proxy(running_server.port, forward) as proxy:
        command = [sys.executable, "-c", _FINISHED, proxy.url, str(store.home), str(checkpoint)]
        write(store, points)
        subprocess.run(command, check=True)
        assert any("model.nemo" in line for line in proxy.requests)
    (model,) = tracking.client().search_logged_models([tracking.experiment_id()])
    assert model.status == LoggedModelStatus.PENDING
    assert tracking.client().search_model_versions("name = 'fedsft-tiny'") == []
    assert Outbox(store.outbox).deliver(tracking) == []
    _assert_complete(tracking, points)


_FINISHED = """
import sys
from pathlib import Path
from fedsft_assets.store import Store
from fedsft_assets.tracking import Tracking
from fedsft_assets_tests.tracking.examples import finish, track
url, home, checkpoint = sys.argv[1:]
with track(Tracking(url, patience=8), Store(Path(home))) as job:
    assert finish(job, Path(checkpoint)).version is None
"""


def test_a_silent_server_holds_nobody_up(
    running_server: TrackingServer, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    tracking = Tracking(running_server.url)
    points = [Point("train_loss", step / 7, 1, step, None, step, 1, time=1.7e9 + step) for step in range(20_000)]

    def cancelled_job(url: str) -> None:
        with track(Tracking(url, patience=0.1), store):
            until(lambda: proxy.requests, "a request is under way")
            write(store, points)
            logged.append(len(proxy.served))
            raise KeyboardInterrupt

    logged: list[int] = []
    with Proxy(running_server.port, lambda _: "hold") as proxy:
        with pytest.raises(KeyboardInterrupt):
            cancelled_job(proxy.url)
        assert (logged, proxy.served) == ([0], [])  # all were logged and the job had ended before any answer
        assert len(proxy.requests) == 1
    (waits,) = Outbox(store.outbox).entries()
    assert caplog.messages[-1].startswith("fedavg · not everything was delivered to the tracking server")
    assert str(store.outbox / waits) in caplog.messages[-1]
    until(lambda: not Outbox(store.outbox).deliver(tracking), "the job's own thread lets go, and all is sent")
    _assert_complete(tracking, points, "KILLED")


def test_what_a_server_never_took_is_delivered_by_the_command(
    server: TrackingServer, store: Store, checkpoint: Path
) -> None:
    tracking, points = Tracking(server.url, patience=0.5), job_points()
    with track(tracking, store) as job:
        write(store, points)
        registered = finish(job, checkpoint)
    assert (registered.model, registered.version, registered.run_id) == ("fedsft-tiny", None, None)
    assert not tracking_record(store).exists()
    (checkpoint / "report.json").unlink()  # what is to be delivered does not depend on what others do later

    track_command = [sys.executable, "-m", "fedsft_assets.cli", "track"]
    environment = {"FEDSFT_HOME": str(store.home), "MLFLOW_TRACKING_URI": server.url, "PATH": "/usr/bin:/bin"}
    down = subprocess.run(track_command, env=environment, capture_output=True, text=True, check=False)
    assert down.returncode == 1
    assert "fedavg" in down.stderr
    assert "Connection refused" in down.stderr
    assert len(Outbox(store.outbox).entries()) == 1

    server.start()
    both = [
        subprocess.Popen(track_command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate()[0] for process in both]
    assert "".join(outputs).count("delivered to MLflow, as version 1") == 1
    _assert_complete(tracking, points)
    assert list(store.outbox.iterdir()) == []
    again = subprocess.run(track_command, env=environment, capture_output=True, text=True, check=True)
    assert again.stdout == "no pending MLflow records\n"


def test_next_job_delivers_what_waits(running_server: TrackingServer, store: Store, checkpoint: Path) -> None:
    tracking, points = Tracking(running_server.url), job_points()
    with track(Tracking(f"http://{HOST}:{unused_port()}", patience=0.1), store) as job:
        write(store, points)
        finish(job, checkpoint)
    assert len(Outbox(store.outbox).entries()) == 1
    with track(tracking, store) as job:
        until(lambda: not Outbox(store.outbox).entries(), "what waited is delivered")
        ids = {run.info.run_id for run in _all_runs(tracking) if run.info.status == "FINISHED"}
        assert len(ids) == 3
        finish(job, checkpoint)


def _all_runs(tracking: Tracking) -> list:
    client = tracking.client()
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return list(client.search_runs([experiment.experiment_id])) if experiment else []


def test_entry_that_mlflow_refuses_does_not_hold_up_the_others(
    running_server: TrackingServer, store: Store, checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracking, points, outbox = Tracking(running_server.url), job_points(), Outbox(store.outbox)
    nowhere = Tracking(f"http://{HOST}:{unused_port()}", patience=0.1)
    with track(nowhere, store) as job:
        finish(job, checkpoint)
    bad = outbox.get(outbox.entries()[0])
    assert bad is not None
    bad.save(replace(bad.execution, params={"a name with a \0 in it": "1"}))
    with track(nowhere, store) as job:
        write(store, points)
        finish(job, checkpoint)
    caplog.clear()
    caplog.set_level("INFO", "fedsft_assets")
    (left,) = outbox.deliver(tracking)
    assert left.folder == bad.folder
    assert "a name with a" in left.reason
    assert len(caplog.messages) == 1
    assert outbox.entries() == [bad.execution.id]


def test_a_killed_process_goes_on_in_the_same_mlflow_runs(
    running_server: TrackingServer, store: Store, checkpoint: Path
) -> None:
    """Killed with points that were sent, points that were not, and a request whose answer it never saw."""
    tracking, points = Tracking(running_server.url), job_points()
    batches: list[str] = []

    def forward(line: str) -> str:
        if not line.split()[1].endswith("runs/log-batch"):
            return "pass"
        batches.append(line)
        return {1: "pass", 2: "pass", 3: "drop"}.get(len(batches), "hold")  # parameters, the job, one site, the other

    with Proxy(running_server.port, forward) as proxy:
        command = [sys.executable, "-c", _KILLED, proxy.url, str(store.home)]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            try:
                write(store, points[:30])
                until(lambda: len(batches) >= 4, "one batch is served whose answer is lost, and one is not")
            finally:
                process.send_signal(signal.SIGKILL)
    before = {name: run.info.run_id for name, run in runs(tracking).items()}
    sent = stored(tracking)
    assert 0 < len(sent) < len(expected(points[:30]))
    assert set(sent) <= set(expected(points))

    with track(tracking, store, "the execution") as job:
        write(store, points[30:])
        finish(job, checkpoint)
    assert {name: run.info.run_id for name, run in runs(tracking).items()} == before
    _assert_complete(tracking, points)


_KILLED = """
import sys
from pathlib import Path
from fedsft_assets.store import Store
from fedsft_assets.tracking import Tracking
from fedsft_assets_tests.tracking.examples import track
url, home = sys.argv[1:]
job = track(Tracking(url), Store(Path(home)), "the execution")
sys.stdin.read()
"""
