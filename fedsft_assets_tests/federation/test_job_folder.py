"""The job folder: what NVFlare's own tools take, whole, repeatable, and right for every site."""

import io
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsft_assets.federation.job_folder import JobFolderReport, build_job_folder, read_plans, read_spec
from fedsft_assets.settings import PROJECT
from fedsft_assets.specs import COMBINED, PRESETS, JobSpec, PeftSpec
from fedsft_assets.store import SPLITS, Store, file_digest, folder_digest, split_file
from fedsft_assets_tests.shipped import DATASETS

TINY = PRESETS["tiny"]

Build = Callable[..., JobFolderReport]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A home with splits of one record each, which say where they belong."""
    store = Store(tmp_path / "home")
    for dataset in (*DATASETS, COMBINED):
        for split in SPLITS:
            path = split_file(store.splits(dataset), split)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"input": dataset, "output": split}) + "\n")
    return store


@pytest.fixture
def build(store: Store) -> Build:
    """Build a shipped job's folder, with overrides."""

    def build_job(job: str, **overrides: Any) -> JobFolderReport:
        spec = JobSpec.load(PROJECT / "jobs" / f"{job}.yaml", list(DATASETS))
        return build_job_folder(spec.override(**overrides), TINY, store)

    return build_job


def test_folder_has_a_part_for_the_server_and_for_each_site(store: Store, build: Build) -> None:
    report = build("fedavg")
    folder = store.job_folder("fedavg")
    assert report.files == sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert {"meta.json", "job.json", "app_server/config/config_fed_server.json"} <= set(report.files)
    for site in ("site-1", "site-2", "site-3"):
        assert f"app_{site}/config/config_fed_client.json" in report.files
        assert f"app_{site}/config/plan.json" in report.files
    assert report.digest == folder_digest(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["fedavg"]


def test_meta_says_where_each_part_goes_and_that_all_sites_are_needed(store: Store, build: Build) -> None:
    build("fedavg")
    meta = json.loads((store.job_folder("fedavg") / "meta.json").read_text())
    assert meta["name"] == "fedavg"
    assert meta["min_clients"] == 3
    assert meta["deploy_map"] == {
        "app_server": ["server"],
        "app_site-1": ["site-1"],
        "app_site-2": ["site-2"],
        "app_site-3": ["site-3"],
    }


@pytest.mark.parametrize("job", ["alpaca", "combined", "fedavg"])
def test_folder_is_accepted_by_nvflares_own_validator(store: Store, build: Build, job: str) -> None:
    from nvflare.private.fed.server.job_meta_validator import JobMetaValidator

    build(job)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted(store.job_folder(job).rglob("*")):
            archive.write(path, f"{job}/{path.relative_to(store.job_folder(job)).as_posix()}")
    accepted, error, _ = JobMetaValidator().validate(job, packed.getvalue())
    assert (accepted, error) == (True, "")


def test_plan_tells_a_site_all_that_it_needs(store: Store, build: Build) -> None:
    report = build("fedavg", rounds=4, batch_size=2)
    plans = read_plans(store.job_folder("fedavg"))
    assert plans == report.plans
    assert [plan.site for plan in plans] == ["site-1", "site-2", "site-3"]
    for plan, dataset in zip(plans, DATASETS, strict=True):
        assert json.loads(plan.training_file.read_text()) == {"input": dataset, "output": "training"}
        assert json.loads(plan.validation_file.read_text()) == {"input": COMBINED, "output": "validation"}
        assert plan.digests == {
            "training_file": file_digest(plan.training_file),
            "validation_file": file_digest(plan.validation_file),
        }
        assert (plan.job, plan.rounds, plan.training.batch_size) == ("fedavg", 4, 2)
        assert plan.training.learning_rate == TINY.learning_rate
        assert plan.base_model == store.base_model("tiny")
        plan.verify_files()


def test_centralized_job_trains_on_the_combined_split(store: Store, build: Build) -> None:
    (plan,) = build("combined").plans
    assert plan.training_file == split_file(store.combined, "training")


def test_folder_holds_the_job_with_its_overrides(store: Store, build: Build) -> None:
    build("fedavg", rounds=4, learning_rate=0.5)
    spec = read_spec(store.job_folder("fedavg"))
    assert (spec.name, spec.kind, spec.rounds, spec.training.learning_rate) == ("fedavg", "federated", 4, 0.5)


def test_server_part_carries_the_code_that_the_server_runs(store: Store, build: Build) -> None:
    build("fedavg", rounds=4)
    server = store.job_folder("fedavg") / "app_server"
    for name in ("server.py", "metrics.py"):
        carried = server / "custom" / "fedsft_assets" / "federation" / name
        assert carried.read_text() == (PROJECT / "fedsft_assets" / "federation" / name).read_text()
    config = json.loads((server / "config" / "config_fed_server.json").read_text())
    (workflow,) = config["workflows"]
    assert workflow["path"] == "fedsft_assets.federation.server.FederatedSFT"
    assert workflow["args"] == {"base_model": str(store.base_model("tiny")), "num_clients": 3, "num_rounds": 4}


def test_server_of_a_job_with_adapters_needs_no_base_model(store: Store, build: Build) -> None:
    (plan, *_) = build("fedavg", peft={"rank": 4}).plans
    assert plan.training.peft == PeftSpec(rank=4)
    config = json.loads((store.job_folder("fedavg") / "app_server/config/config_fed_server.json").read_text())
    assert not config["workflows"][0]["args"].get("base_model")


def test_site_runs_the_package_that_is_installed_there(store: Store, build: Build) -> None:
    build("alpaca")
    folder = store.job_folder("alpaca") / "app_site-1"
    config = (folder / "config" / "config_fed_client.json").read_text()
    assert re.search(r'"python3",\s*"-u",\s*"-m",\s*"fedsft_assets.federation.client",\s*"--plan"', config)
    assert str(PROJECT) not in config
    assert not (folder / "custom").exists()


def test_same_job_and_data_give_the_same_digest(store: Store, build: Build) -> None:
    first = build("fedavg")
    assert build("fedavg") == first
    shutil.rmtree(store.job_folder("fedavg"))
    assert build("fedavg") == first


def test_digest_follows_the_job_and_the_data(store: Store, build: Build) -> None:
    first = build("alpaca").digest
    other_job = build("alpaca", rounds=3).digest
    split_file(store.combined, "validation").write_text("{}\n")
    other_data = build("alpaca").digest
    assert len({first, other_job, other_data}) == 3


@pytest.mark.parametrize(("dataset", "split"), [("dolly", "training"), (COMBINED, "validation")])
def test_missing_split_is_named_and_the_old_folder_stays(store: Store, build: Build, dataset: str, split: str) -> None:
    before = build("fedavg").digest
    path = split_file(store.splits(dataset), split)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"job fedavg, site-.: {path} does not exist; materialize its asset"):
        build("fedavg", rounds=3)
    assert folder_digest(store.job_folder("fedavg")) == before


def test_rebuilt_folder_keeps_nothing_of_the_old_one(store: Store, build: Build) -> None:
    build("fedavg")
    stale = store.job_folder("fedavg") / "app_site-9" / "config" / "plan.json"
    stale.parent.mkdir(parents=True)
    stale.write_text("{}")
    assert build("fedavg").digest == folder_digest(store.job_folder("fedavg"))
    assert not stale.exists()
    assert [path.name for path in store.job_folder("fedavg").parent.iterdir()] == ["fedavg"]
