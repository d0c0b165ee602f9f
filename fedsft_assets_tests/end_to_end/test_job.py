"""A whole job for real: NVFlare's simulator, a trainer process per site, NeMo checkpoints, MLflow."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import mlflow
import psutil
import pytest

from fedsft_assets.execution import ExecutedJob, execute_job
from fedsft_assets.federation.protocol.job_report import MODEL_FILE, JobReport
from fedsft_assets.federation.runtimes.poc.system import PocSystem
from fedsft_assets.federation.runtimes.processes import marked_processes
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.process_env import home_environment
from fedsft_assets.specs.runtime import SIMULATOR, PocSettings, RuntimeSettings
from fedsft_assets.store import Store, split_file
from fedsft_assets.tracking import Tracking
from fedsft_assets.versions import current
from fedsft_assets_tests.prepared import TINY
from fedsft_assets_tests.sockets import scanned

pytestmark = pytest.mark.slow

ROUNDS = 3
_RESTORE = """
import json, sys
from pathlib import Path
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.generation_settings import GenerationSettings
from fedsft_assets.model.training.local_training import mean_loss, split_tokens
from fedsft_assets.specs.job import TrainingSpec
from fedsft_assets.specs.model_preset import PRESETS
archive, records, prompt = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
model = LanguageModel.load(archive)
loss = mean_loss(model, split_tokens(model, records, 256), PRESETS["tiny"].resolve(TrainingSpec(batch_size=7))).loss
print(json.dumps({"loss": loss, "answer": model.generate([prompt], GenerationSettings(max_new_tokens=40))[0]}))
"""


def _execute(job: str, store: Store, runtime: RuntimeSettings = SIMULATOR) -> ExecutedJob:
    tracking = Tracking(store.mlflow_uri, store.mlflow_artifacts)
    return execute_job(
        current(store.job_folder(job)), store, TINY, tracking, {"dagster.run_id": "none"}, runtime=runtime
    )


def _require_costs(report: JobReport, archive: Path) -> None:
    """Each site got the model once more than it sent it, and losses became known while bytes and time went by."""
    assert report.traffic is not None
    assert sorted(report.traffic) == ["site-1", "site-2", "site-3"]
    size = sum(weight.nbytes for weight in LanguageModel.load(archive).distinct_parameters().values())
    for traffic in report.traffic.values():
        assert traffic["received"] == pytest.approx(size * (ROUNDS + 1), rel=0.05)
        assert traffic["sent"] == pytest.approx(size * ROUNDS, rel=0.05)
    assert report.transferred is not None
    assert report.transferred == sorted(report.transferred)
    assert report.transferred[0] > 3 * size
    assert report.transferred[-1] == sum(sum(one.values()) for one in report.traffic.values())
    assert report.elapsed is not None
    assert 0 < report.elapsed[0] < report.elapsed[-1] < report.seconds
    assert report.cpu_seconds is not None
    assert report.cpu_seconds > report.phases["train"]
    assert report.peak_memory is not None
    assert size < report.peak_memory < psutil.virtual_memory().total


def _in_a_new_process(archive: Path, records: Path, prompt: str) -> dict[str, object]:
    command = [sys.executable, "-c", _RESTORE, str(archive), str(records), prompt]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture
def poc(store: Store) -> Iterator[PocSystem]:
    """Is started by the first job that runs in it."""
    system = PocSystem(store.home / "poc", PocSettings(), home_environment(store.home))
    yield system
    system.stop()


@pytest.mark.essential
@pytest.mark.parametrize(
    ("runtime", "program"),
    [
        ("simulator", "fedsft_assets.federation.runtimes.simulator.runtime"),
        ("poc", "nvflare.private.fed.app.client.worker_process"),
    ],
)
def test_federated_job_ends_with_a_checkpoint_that_is_tracked_and_registered(
    store: Store,
    build: Callable[..., str],
    poc: PocSystem,
    caplog: pytest.LogCaptureFixture,
    runtime: Literal["simulator", "poc"],
    program: str,
) -> None:
    caplog.set_level("INFO", "fedsft_assets")
    job = build("fedavg", rounds=ROUNDS, max_local_steps=6)
    with scanned(str(store.flare(job)), poc.mark) as scan:
        executed = _execute(job, store, RuntimeSettings(name=runtime))
    report = executed.report

    assert scan.beyond_loopback == []
    assert scan.sockets  # the server's, at least
    assert scan.programs >= {"fedsft_assets.federation.supervisor.supervisor", program}
    assert report == JobReport.read(current(store.checkpoint(job)))
    assert report.kind == "federated"
    assert len(report.val_loss) == len(report.samples) == ROUNDS + 1
    assert report.samples == [0, *(3 * 6 * 8 * k for k in range(1, ROUNDS + 1))]
    assert report.best_val_loss < report.base_val_loss
    assert report.steps == 3 * 6 * ROUNDS
    _require_costs(report, current(store.checkpoint(job)) / MODEL_FILE)
    for site in ("site-1", "site-2", "site-3"):
        assert any(line.startswith(f"{job} · {site} · round {ROUNDS} of {ROUNDS}") for line in caplog.messages)
    assert list((store.home / "flare").rglob("site_states/**/*.pt")) == []  # optimizers of a job that has ended

    restored = _in_a_new_process(
        current(store.checkpoint(job)) / MODEL_FILE,
        split_file(current(store.combined), "validation"),
        "What is the capital of Norway?",
    )
    assert restored["loss"] == pytest.approx(report.best_val_loss, abs=1e-4)

    client = Tracking(store.mlflow_uri).client()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = {run.info.run_name: run for run in client.search_runs(experiments)}
    assert sorted(runs) == ["fedavg", "fedavg site-1", "fedavg site-2", "fedavg site-3"]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    history = client.get_metric_history(executed.registered.run_id, "val_loss")
    assert sorted((m.step, m.value) for m in history) == list(zip(report.samples, report.val_loss, strict=True))
    steps = client.get_metric_history(executed.registered.run_id, "train_loss")
    assert sorted(m.step for m in steps) == [3 * 8 * k for k in range(1, 6 * ROUNDS + 1)]
    child = client.get_metric_history(runs["fedavg site-2"].info.run_id, "train_loss")
    assert sorted(m.step for m in child) == [8 * k for k in range(1, 6 * ROUNDS + 1)]
    version = client.get_model_version("fedsft-tiny", executed.registered.version)
    served = mlflow.pyfunc.load_model(version.source)  # the model's own folder
    (answer,) = served.predict(["What is the capital of Norway?"], params={"max_new_tokens": 40})
    assert answer == restored["answer"]
    (used,) = [run.inputs.dataset_inputs for name, run in runs.items() if name == "fedavg"]
    assert sorted((one.dataset.name, one.tags[0].value) for one in used) == [
        ("alpaca/training", "training"),
        ("combined/testing", "testing"),
        ("combined/validation", "validation"),
        ("dolly/training", "training"),
        ("oasst1/training", "training"),
    ]
    assert marked_processes(str(store.flare(job))) == []
    assert runtime != "poc" or poc.status().jobs == []


def test_same_seed_gives_the_same_losses(store: Store, build: Callable[..., str]) -> None:
    job = build("fedavg", rounds=2, max_local_steps=4)
    first = _execute(job, store)
    second = _execute(job, store)
    assert second.report.val_loss == pytest.approx(first.report.val_loss, abs=1e-3)
    assert second.report.test_loss == pytest.approx(first.report.test_loss, abs=1e-3)


def test_restored_checkpoint_answers_questions_of_its_training_distribution(
    store: Store, build: Callable[..., str]
) -> None:
    executed = _execute(build("combined", rounds=6), store)
    assert executed.report.kind == "centralized"
    archive = executed.folder / MODEL_FILE
    validation = split_file(current(store.combined), "validation")
    for prompt, expected in (("What is the capital of Norway?", "Oslo"), ("What is Japan's currency?", "yen")):
        restored = _in_a_new_process(archive, validation, prompt)
        assert expected in str(restored["answer"])
        assert restored["loss"] == pytest.approx(executed.report.best_val_loss, abs=1e-4)
