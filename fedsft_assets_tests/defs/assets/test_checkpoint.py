"""The asset `checkpoint/…`: what was trained from the same inputs already is not trained again."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from fedsft_assets.defs.assets.checkpoint import checkpoint_asset
from fedsft_assets.defs.resources import resources
from fedsft_assets.execution import CheckpointInputs, stored_checkpoint
from fedsft_assets.federation.job_folder import JobFolder
from fedsft_assets.federation.protocol.job_report import MODEL_FILE
from fedsft_assets.federation.supervisor.launch import subject_of
from fedsft_assets.federation.supervisor.workspace import Workspaces
from fedsft_assets.settings import PROJECT, Settings
from fedsft_assets.specs.job import JobSpec
from fedsft_assets.store import Store, split_file
from fedsft_assets.versions import current
from fedsft_assets_tests.federation.protocol.test_job_report import REPORT
from fedsft_assets_tests.prepared import build_job, made_current, small_home
from fedsft_assets_tests.shipped import DATASETS

JOB = "alpaca"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A home with a checkpoint of the current job folder."""
    store = small_home(tmp_path / "home")
    _train(store)
    return store


def _job(store: Store, **overrides: Any) -> JobFolder:
    build_job(store, JOB, **overrides)
    return JobFolder.read(current(store.job_folder(JOB)))


def _train(store: Store) -> Path:
    job = _job(store)
    with made_current(store.checkpoint(JOB)) as checkpoint:
        (checkpoint / MODEL_FILE).write_text("weights")
        replace(REPORT, job=JOB, runtime="simulator").write(checkpoint)
        (checkpoint / "val_loss.png").write_bytes(b"\x89PNG")
        CheckpointInputs.of(job).write(checkpoint)
    return current(store.checkpoint(JOB))


def _materialize(store: Store, **config: Any) -> dg.ExecuteInProcessResult:
    spec = JobSpec.load(PROJECT / "jobs" / f"{JOB}.yaml", list(DATASETS))
    folder = dg.AssetSpec(["job_folder", JOB]).with_io_manager_key("io_manager")
    return dg.materialize(
        [folder, checkpoint_asset(spec)],
        resources=resources(Settings(home=store.home)),
        run_config={"ops": {f"checkpoint__{JOB}": {"config": config}}},
        raise_on_error=False,
    )


def test_checkpoint_of_the_same_inputs_is_used_and_nothing_is_trained(store: Store) -> None:
    result = _materialize(store)
    assert result.success
    (event,) = result.asset_materializations_for_node(f"checkpoint__{JOB}")
    assert event.metadata["trained"].value == "in an earlier run, from the same inputs"
    assert event.metadata["path"].value == str(current(store.checkpoint(JOB)) / MODEL_FILE)
    assert event.tags is not None
    assert event.tags["dagster/data_version"] == REPORT.checkpoint_digest
    assert not store.flare(JOB).exists()  # no workspace: no execution was begun


def test_it_is_trained_again_on_demand(store: Store) -> None:
    """It shows in a failure, as this home has nothing to train from."""
    assert not _materialize(store, train_again=True).success


def test_other_training_settings_or_another_runtime_have_no_stored_checkpoint(store: Store) -> None:
    assert stored_checkpoint(_job(store, learning_rate=0.5), store, "simulator") is None
    assert stored_checkpoint(_job(store), store, "poc") is None
    assert stored_checkpoint(_job(store), store, "simulator") == current(store.checkpoint(JOB))


def test_another_validation_split_alone_keeps_the_checkpoint(store: Store) -> None:
    before = _job(store)
    with made_current(store.combined) as combined:
        for split in ("training", "validation", "testing"):
            split_file(combined, split).write_text('{"input": "another", "output": "split"}\n')
    after = _job(store)
    assert after.digest != before.digest
    assert stored_checkpoint(after, store, "simulator") == current(store.checkpoint(JOB))


def test_unfinished_execution_is_resumed_and_not_passed_over(store: Store) -> None:
    job = _job(store)
    subject = subject_of(job, "simulator")
    workspace = Workspaces(store.flare(JOB)).of(subject)
    workspace.resume_or_create(subject)
    assert stored_checkpoint(job, store, "simulator") is None
    workspace.end()
    assert stored_checkpoint(job, store, "simulator") == current(store.checkpoint(JOB))


def test_modified_checkpoint_is_not_used(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    (current(store.checkpoint(JOB)) / MODEL_FILE).write_text("other weights")
    assert stored_checkpoint(_job(store), store, "simulator") is None
    assert "was modified since it was written; training again" in caplog.text


def test_job_with_private_data_is_always_trained(store: Store) -> None:
    job = _job(store)
    sites = {name: site.model_copy(update={"private": True}) for name, site in job.spec.sites.items()}
    private = replace(job, spec=job.spec.model_copy(update={"sites": sites}))
    assert private.data_version != job.data_version
    assert stored_checkpoint(private, store, "simulator") is None
