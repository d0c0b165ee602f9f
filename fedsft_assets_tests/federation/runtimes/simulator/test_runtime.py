"""The runtime `simulator` as a supervisor uses it; whole jobs are in the end-to-end tests."""

import json
import shutil
import time
from pathlib import Path

import pytest

from fedsft_assets.federation.job_folder import JobFolder, build_job_folder
from fedsft_assets.federation.protocol.journal import JOURNAL_FILE, Finished, Started, to_line
from fedsft_assets.federation.protocol.messages import EXECUTION_KEY, STUDY_HOME
from fedsft_assets.federation.runtimes.processes import MARK, execution_mark, marked_processes
from fedsft_assets.federation.runtimes.simulator.runtime import Simulator
from fedsft_assets.specs.dataset import COMBINED
from fedsft_assets.specs.job import JobSpec, SiteSpec
from fedsft_assets.specs.model_preset import PRESETS
from fedsft_assets.store import Store, split_file
from fedsft_assets.versions import current
from fedsft_assets_tests.prepared import made_current


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    mark = execution_mark(str(tmp_path))
    monkeypatch.setenv(MARK, mark)
    monkeypatch.setenv(STUDY_HOME, str(tmp_path))
    return mark


def _job_folder(home: Path) -> Path:
    """A job folder for the execution `an-execution`, on files that nobody reads."""
    store = Store(home)
    for dataset, split in (("alpaca", "training"), (COMBINED, "validation")):
        with made_current(store.splits(dataset)) as splits:
            split_file(splits, split).write_text("{}\n", encoding="utf-8")
    with made_current(store.base_model("tiny")) as base_model:
        (base_model / "tiny.nemo").write_text("nobody reads it", encoding="utf-8")
    spec = JobSpec(name="job", description="", rounds=1, sites={"site-1": SiteSpec(dataset="alpaca")})
    build_job_folder(spec, PRESETS["tiny"], store)
    meta_file = current(store.job_folder("job")) / "meta.json"
    meta = json.loads(meta_file.read_text(encoding="utf-8"))
    meta_file.write_text(json.dumps({**meta, EXECUTION_KEY: "an-execution"}), encoding="utf-8")
    return current(store.job_folder("job"))


@pytest.mark.slow
def test_simulation_that_ends_without_finishing_has_failed_whatever_was_left(tmp_path: Path, mark: str) -> None:
    job_folder = _job_folder(tmp_path)
    shutil.rmtree(job_folder / "app_server")  # NVFlare does not take it
    simulator = Simulator(tmp_path / "runtime", 1, JobFolder.read(job_folder).base_model)
    list(simulator.gather(["site-1"], 1))
    journal = tmp_path / "runtime" / "states" / "an-execution" / JOURNAL_FILE
    journal.parent.mkdir(parents=True)
    journal.write_text(to_line(Started(0)) + to_line(Finished()), encoding="utf-8")
    try:
        job_id = simulator.submit(job_folder, "a-token")
        while not (state := simulator.poll(job_id)).ended:
            time.sleep(0.1)
        assert not state.succeeded
        assert len(simulator.new_lines(job_id)) == 2
        assert simulator.journal(job_id) == journal.read_text(encoding="utf-8").splitlines()
        with journal.open("a", encoding="utf-8") as file:
            file.write(to_line(Finished()))
        assert simulator.poll(job_id).succeeded
    finally:
        simulator.close()
    assert marked_processes(mark) == []
    assert not (tmp_path / "runtime" / "tmp").exists()
