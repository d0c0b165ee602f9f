"""Runs a federated job of two short rounds in the simulator and prints the seconds of each of its phases as JSON."""

import json
import sys
from pathlib import Path

from benchmarks.data import PROJECT
from benchmarks.data_files import FOLDERS
from benchmarks.training_data import TrainingInput
from benchmarks.training_ours import preset
from fedsft_assets.federation.job_folder import build_job_folder
from fedsft_assets.federation.launch import run_job
from fedsft_assets.federation.report import JobReport
from fedsft_assets.specs import JobSpec
from fedsft_assets.store import Store, split_file

_JOB = "fedavg"
_SHORT = {"rounds": 2, "max_local_steps": 10, "max_evaluation_records": 100}


def phases(given: TrainingInput) -> dict[str, float]:
    """Seconds of each phase where it took longest, and of the whole `job`."""
    store, model = Store(given.folder / "home"), preset(given.part)
    for linked, made in (
        (store.home / "processed", given.folder / "splits"),
        (store.combined, given.folder / "splits" / "combined"),
        (store.base_model(model.name), given.archive),
    ):
        linked.parent.mkdir(parents=True, exist_ok=True)
        linked.unlink(missing_ok=True)  # of an earlier run in a folder that was kept
        linked.symlink_to(made)
    spec = JobSpec.load(PROJECT / "jobs" / f"{_JOB}.yaml", list(FOLDERS)).override(**_SHORT)
    build_job_folder(spec, model, store)
    *_, report = run_job(
        store.job_folder(_JOB), store.flare(_JOB), split_file(store.combined, "testing"), store.checkpoint(_JOB)
    )
    assert isinstance(report, JobReport), "run_job ends with a report or raises"
    return {**report.phases, "job": round(report.seconds, 3)}


if __name__ == "__main__":
    print(json.dumps(phases(TrainingInput.read(Path(sys.argv[1])))))
