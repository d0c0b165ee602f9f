"""What an earlier version has left, in archives, startup kits and job folders, is taken or gets a clear error."""

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from nvflare.fuel.utils.class_utils import instantiate_class

from fedsft_assets.evaluation.budgets import budget_cells, differing_budgets
from fedsft_assets.evaluation.tables import Tables
from fedsft_assets.federation.job_folder import JobFolderError, verify_job_folder
from fedsft_assets.federation.protocol.job_report import REPORT_FILE, JobReport
from fedsft_assets.files import file_digest, folder_digest
from fedsft_assets.model.archive.nemo_archive import CONFIG
from fedsft_assets.model.nemo_model import SFTModel
from fedsft_assets.store import Store
from fedsft_assets.tracking import Outbox, Tracking
from fedsft_assets.tracking.registry import local_folder
from fedsft_assets.versions import adding, current, make_current
from fedsft_assets_tests.federation.protocol.test_job_report import REPORT
from fedsft_assets_tests.prepared import build_job, prepare_home

_NOT_IN_0_1 = ("steps", "traffic", "cpu_seconds", "peak_memory", "elapsed", "transferred")


@pytest.mark.parametrize(
    ("component", "command"),
    [
        ("site_connection.SiteConnection", "fedsft-site configure"),
        ("server_connections.ServerConnections", "fedsft-server configure"),
    ],
)
def test_startup_kit_that_version_0_1_configured_says_how_to_configure_it_again(component: str, command: str) -> None:
    with pytest.raises(RuntimeError, match=f"configured with fedsft-assets 0.1; configure it again: {command}"):
        instantiate_class(f"fedsft_assets.federation.{component}", {})


def test_archive_that_version_0_1_wrote_is_restored(tmp_path: Path) -> None:
    store = prepare_home(tmp_path / "home")
    archive = next(current(store.base_model("tiny")).glob("*.nemo"))
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "files", filter="data")
    config = next((tmp_path / "files").rglob(CONFIG))
    content = config.read_text(encoding="utf-8")
    assert "fedsft_assets.model.nemo_model.SFTModel" in content
    config.write_text(content.replace("model.nemo_model", "model.sft_model"), encoding="utf-8")
    with tarfile.open(tmp_path / "old.nemo", "w") as tar:
        for path in sorted(config.parent.iterdir()):
            tar.add(path, f"./{path.name}")
    assert isinstance(SFTModel.load(tmp_path / "old.nemo"), SFTModel)


def test_report_that_version_0_1_wrote_is_shown_without_what_it_did_not_know(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with adding(store.checkpoint("fedavg")) as addition:
        REPORT.write(addition.folder)
        path = addition.folder / REPORT_FILE
        known = {name: value for name, value in json.loads(path.read_text()).items() if name not in _NOT_IN_0_1}
        path.write_text(json.dumps(known), encoding="utf-8")
    make_current(addition.version)
    report = JobReport.read(addition.version)
    assert {getattr(report, name) for name in _NOT_IN_0_1} == {None}
    tables = Tables(tmp_path)
    unknown = ["steps", "bytes_up", "bytes_down", "cpu_seconds", "peak_memory"]
    assert tables.budgets()[unknown].isna().all(axis=None)
    assert tables.curves()[["bytes", "seconds"]].isna().all(axis=None)
    assert tables.traffic().empty
    headers, [cells] = budget_cells([report])
    assert dict(zip(headers, cells, strict=True)) == {
        "job": "fedavg",
        "rounds": "2",
        "steps": "unknown",
        "tokens trained": "150",
        "MB up": "unknown",
        "MB down": "unknown",
        "seconds": "2",
        "CPU seconds": "unknown",
        "peak memory, MB": "unknown",
    }
    assert differing_budgets([report, replace(REPORT, job="combined", kind="centralized")], 0.05) == []


def test_job_folder_of_another_version_is_not_run(tmp_path: Path) -> None:
    store = prepare_home(tmp_path / "home")
    build_job(store, "alpaca")
    folder = current(store.job_folder("alpaca"))
    verify_job_folder(folder)
    (plan,) = folder.glob("app_*/config/plan.json")
    plan.write_text(json.dumps({**json.loads(plan.read_text()), "package": "0.1.0", "more": 1}), encoding="utf-8")
    manifest = folder / "manifest.json"
    digests = json.loads(manifest.read_text()) | {str(plan.relative_to(folder)): file_digest(plan)}
    manifest.write_text(json.dumps(digests), encoding="utf-8")
    folder = folder.rename(folder.with_name(folder_digest(folder)))
    with pytest.raises(
        JobFolderError, match=r"was built with fedsft-assets 0\.1\.0, but .* is installed; build it again"
    ):
        verify_job_folder(folder)


_EXECUTION = {
    "id": "one",
    "job": "fedavg",
    "sites": ["site-1"],
    "params": {"rounds": "1"},
    "tags": {"dagster.run_id": "abc"},
    "note": "FedAvg",
    "begun": 1.7e9,
    "runs": {},
    "ended": False,
}


@pytest.mark.parametrize("archive_is_there", [True, False])
def test_what_waited_for_the_tracking_server_before_models_were_logged_is_delivered_as_a_model(
    tmp_path: Path, empty_mlflow_database: Path, archive_is_there: bool
) -> None:
    store = Store(tmp_path / "home")
    entry = store.outbox / "one"
    (entry / "artifacts").mkdir(parents=True)
    (entry / "artifacts" / "checkpoint.json").write_text("{}")
    (entry / "execution.json").write_text(json.dumps(_EXECUTION))
    point = {"name": "val_loss", "value": 2.0, "round": 1, "samples": 8, "site": None, "step": None, "tokens": None}
    (entry / "points.jsonl").write_text(json.dumps({**point, "time": 1.7e9}) + "\n")
    archive = store.checkpoint("fedavg") / "version" / "model.nemo"
    registration = {"model": "m", "archive": str(archive), "digest": "c" * 64, "test_loss": 2.5, "data": "d" * 64}
    ending = {"status": "FINISHED", "at": 1.7e9 + 1, "results": {"test_loss": 2.5}, "tags": {}}
    (entry / "ending.json").write_text(json.dumps({**ending, "registration": registration}))
    if archive_is_there:
        archive.parent.mkdir(parents=True)
        archive.write_text("weights")
    shutil.copyfile(empty_mlflow_database, store.home / "mlflow.db")
    tracking = Tracking(store.mlflow_uri, store.mlflow_artifacts)
    assert Outbox(store.outbox).deliver(tracking) == []
    client = tracking.client()
    (version,) = client.search_model_versions("name = 'm'")
    files = {file.name for file in local_folder(str(version.source)).iterdir()}  # type: ignore[union-attr]
    assert {"MLmodel", "model.nemo" if archive_is_there else "archive.json"} <= files
    assert [metric.value for metric in client.get_metric_history(version.run_id, "val_loss")] == [2.0]
