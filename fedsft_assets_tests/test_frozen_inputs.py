"""What a step gets is what its own run made, whatever other runs make meanwhile; without that, what is current."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from fedsft_assets.defs.assets.job_folder import job_folder_asset
from fedsft_assets.defs.resources import made_by, resources
from fedsft_assets.federation.job_folder import JobFolder
from fedsft_assets.settings import Settings
from fedsft_assets.specs.dataset import COMBINED
from fedsft_assets.specs.job import JobSpec, SiteSpec
from fedsft_assets.store import SPLITS, Store, split_file
from fedsft_assets.versions import Verdict, adding, current, judge
from fedsft_assets_tests.prepared import made_current

_FAILS, _TRAINED = "TEST_FAILS", "TEST_TRAINED"


@dg.asset(ins={"job_folder": dg.AssetIn(["job_folder", "study"])})
def trained(job_folder: Path) -> dg.MaterializeResult[Path]:
    """Stands for a checkpoint: says at what learning rate it was trained, unless it is to fail."""
    if os.environ.get(_FAILS):
        raise RuntimeError("the trainer dies")
    with Path(os.environ[_TRAINED]).open("a") as file:
        print(JobFolder.read(job_folder).plans[0].training.learning_rate, file=file)
    return dg.MaterializeResult(value=job_folder)


def study(home: str, job: str) -> dg.JobDefinition:
    """One of the jobs over a home: `study` makes everything, `train` the checkpoint alone."""
    spec = JobSpec(name="study", description="a study", sites={"site-1": SiteSpec(dataset=COMBINED)}, rounds=1)
    there = [dg.AssetSpec(key).with_io_manager_key("io_manager") for key in ("base_model", COMBINED)]
    everything = dg.Definitions(
        assets=[*there, job_folder_asset(spec), trained],
        jobs=[
            dg.define_asset_job("study", dg.AssetSelection.all()),
            dg.define_asset_job("train", dg.AssetSelection.assets("trained")),
        ],
        resources=resources(Settings(home=Path(home))),
        executor=dg.in_process_executor,
    )
    return everything.resolve_job_def(job)


class Runs:
    """Dagster runs of the study over one home."""

    def __init__(self, store: Store, instance: dg.DagsterInstance, trained: Path) -> None:
        self.store, self._instance, self._trained = store, instance, trained

    def run(self, rate: float) -> dg.JobExecutionResult:
        config = {"ops": {"job_folder__study": {"config": {"learning_rate": rate}}}}
        return dg.execute_job(self._job("study"), self._instance, run_config=config)

    def train(self) -> dg.JobExecutionResult:
        """Materialize what is downstream of the job folder alone."""
        return dg.execute_job(self._job("train"), self._instance)

    def again(self, run_id: str) -> dg.JobExecutionResult:
        """Re-execute from failure."""
        options = dg.ReexecutionOptions.from_failure(run_id, self._instance)
        return dg.execute_job(self._job("study"), self._instance, reexecution_options=options)

    def _job(self, name: str) -> Any:
        given = {"home": str(self.store.home), "job": name}
        return dg.build_reconstructable_job(__name__, "study", reconstructable_args=(), reconstructable_kwargs=given)

    def trained_at(self) -> list[float]:
        """The learning rates, in the order of training."""
        return [float(line) for line in self._trained.read_text().splitlines()] if self._trained.exists() else []


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Runs]:
    store = Store(tmp_path / "home")
    with adding(store.combined) as combined:
        for split in SPLITS:
            split_file(combined.folder, split).write_text("{}\n")
    judge(combined.version, Verdict())
    with made_current(store.base_model("tiny")) as base_model:
        (base_model / "tiny.nemo").write_text("nobody reads it")
    monkeypatch.setenv(_TRAINED, str(tmp_path / "trained"))
    (tmp_path / "dagster").mkdir()
    quiet = {"telemetry": {"enabled": False}}  # it would write to HOME
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster"), overrides=quiet) as instance:
        yield Runs(store, instance, tmp_path / "trained")


def test_a_run_trains_on_what_it_made_itself(runs: Runs) -> None:
    first, second = runs.run(0.001), runs.run(0.002)
    assert runs.trained_at() == [0.001, 0.002]
    for result, rate in ((first, 0.001), (second, 0.002)):
        folder = made_by(runs.store, result.run_id, ["job_folder", "study"])
        assert JobFolder.read(folder).plans[0].training.learning_rate == rate


@pytest.mark.parametrize("other_ends", [True, False], ids=["the other ended well", "the other failed too"])
def test_re_execution_from_failure_after_another_run_has_finished_trains_on_what_its_own_run_made(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, other_ends: bool
) -> None:
    monkeypatch.setenv(_FAILS, "yes")
    failed = runs.run(0.001)
    if other_ends:
        monkeypatch.delenv(_FAILS)
    runs.run(0.002)
    monkeypatch.delenv(_FAILS, raising=False)
    again = runs.again(failed.run_id)
    assert again.success
    assert runs.trained_at() == ([0.002, 0.001] if other_ends else [0.001])


def test_re_execution_of_a_re_execution_goes_back_to_the_first(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_FAILS, "yes")
    failed = runs.run(0.001)
    failed_again = runs.again(failed.run_id)
    monkeypatch.delenv(_FAILS)
    runs.run(0.002)
    assert runs.again(failed_again.run_id).success
    assert runs.trained_at() == [0.002, 0.001]


def test_a_run_that_did_not_make_it_takes_what_is_current(runs: Runs) -> None:
    runs.run(0.001)
    runs.run(0.002)
    assert runs.train().success
    assert runs.trained_at() == [0.001, 0.002, 0.002]
    assert JobFolder.read(current(runs.store.job_folder("study"))).plans[0].training.learning_rate == 0.002
