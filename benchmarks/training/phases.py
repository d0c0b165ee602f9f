"""Runs a federated job of two short rounds in the simulator and prints the seconds of each of its phases as JSON."""

import json
import sys
from pathlib import Path

from benchmarks.data import PROJECT
from benchmarks.data_files import FOLDERS
from benchmarks.training.data import TrainingInput
from benchmarks.training.ours import preset
from fedsft_assets.federation.job_folder import build_job_folder
from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.federation.supervisor.launch import run_job
from fedsft_assets.files import link_or_copy
from fedsft_assets.specs.dataset import COMBINED
from fedsft_assets.specs.job import JobSpec
from fedsft_assets.store import Store, split_file
from fedsft_assets.versions import add_version, adding, current, make_current

_JOB = "fedavg"
_SHORT = {"rounds": 2, "max_local_steps": 10, "max_evaluation_records": 100}


def phases(given: TrainingInput) -> dict[str, float]:
    """Seconds of each phase where it took longest, and of the whole `job`."""
    store, model = Store(given.folder / "home"), preset(given.part)
    for name in (*FOLDERS, COMBINED):
        make_current(add_version(store.splits(name), given.folder / "splits" / name))
    with adding(store.base_model(model.name)) as addition:
        link_or_copy(str(given.archive), str(addition.folder / f"{model.name}.nemo"))
    make_current(addition.version)
    spec = JobSpec.load(PROJECT / "jobs" / f"{_JOB}.yaml", list(FOLDERS)).override(**_SHORT)
    job_folder = build_job_folder(spec, model, store).folder
    testing_file = split_file(current(store.combined), "testing")
    *_, report = run_job(job_folder, store.flare(_JOB), testing_file, store.checkpoint(_JOB))
    assert isinstance(report, JobReport), "run_job ends with a report or raises"
    return {**report.phases, "job": round(report.seconds, 3)}


if __name__ == "__main__":
    print(json.dumps(phases(TrainingInput.read(Path(sys.argv[1])))))
