"""The job folder: what NVFlare's own tools take, whole, repeatable, and right for every site."""

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedsft_assets import __version__
from fedsft_assets.data.records import read_records
from fedsft_assets.federation.job_folder import (
    JobFolder,
    JobFolderError,
    JobFolderReport,
    build_job_folder,
    verify_job_folder,
)
from fedsft_assets.federation.kit_policy import CONTROLLER
from fedsft_assets.federation.server.controller import FederatedSFT
from fedsft_assets.files import file_digest, folder_digest
from fedsft_assets.settings import PROJECT
from fedsft_assets.specs.dataset import COMBINED
from fedsft_assets.specs.job import FedProx, JobSpec, PeftSpec, SiteSpec
from fedsft_assets.specs.model_preset import PRESETS
from fedsft_assets.store import SPLITS, Store, archive_file, split_file
from fedsft_assets.versions import CURRENT, current
from fedsft_assets_tests.prepared import made_current, small_home
from fedsft_assets_tests.shipped import DATASETS

TINY = PRESETS["tiny"]

Build = Callable[..., JobFolderReport]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return small_home(tmp_path / "home")


@pytest.fixture
def build(store: Store) -> Build:
    """Build a shipped job's folder, with overrides."""

    def build_job(job: str, **overrides: Any) -> JobFolderReport:
        spec = JobSpec.load(PROJECT / "jobs" / f"{job}.yaml", list(DATASETS))
        return build_job_folder(spec.override(**overrides), TINY, store)

    return build_job


def test_folder_has_a_part_for_the_server_and_for_each_site(store: Store, build: Build) -> None:
    report = build("fedavg")
    folder = current(store.job_folder("fedavg"))
    assert report.files == sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert {"meta.json", "job.json", "manifest.json", "app_server/config/config_fed_server.json"} <= set(report.files)
    for site in ("site-1", "site-2", "site-3"):
        assert f"app_{site}/config/config_fed_client.json" in report.files
        assert f"app_{site}/config/plan.json" in report.files
    assert report.digest == folder_digest(folder)
    assert sorted(path.name for path in folder.parent.iterdir()) == sorted([report.digest, CURRENT])


def test_private_data_needs_no_copy_and_has_no_digest(store: Store) -> None:
    spec = JobSpec.load(PROJECT / "jobs" / "fedavg.yaml", list(DATASETS))
    sites = {**spec.sites, "site-2": SiteSpec(dataset="patients", private=True)}
    build_job_folder(spec.model_copy(update={"sites": sites}), TINY, store)
    plans = {plan.site: plan for plan in JobFolder.read(current(store.job_folder("fedavg"))).plans}
    assert plans["site-2"].training_file == Path("processed/patients/private/training.jsonl")
    assert plans["site-2"].digests.keys() == {"validation_file"}
    assert plans["site-1"].digests.keys() == {"training_file", "validation_file"}


def test_meta_says_where_each_part_goes_and_that_all_sites_are_needed(store: Store, build: Build) -> None:
    build("fedavg")
    meta = json.loads((current(store.job_folder("fedavg")) / "meta.json").read_text())
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
        for path in sorted(current(store.job_folder(job)).rglob("*")):
            archive.write(path, f"{job}/{path.relative_to(current(store.job_folder(job))).as_posix()}")
    accepted, error, _ = JobMetaValidator().validate(job, packed.getvalue())
    assert (accepted, error) == (True, "")


def test_plan_tells_a_site_all_that_it_needs(store: Store, build: Build) -> None:
    build("fedavg", rounds=4, batch_size=2)
    plans = JobFolder.read(current(store.job_folder("fedavg"))).located_plans
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
        assert plan.base_model == archive_file(current(store.base_model("tiny")))
        plan.verify_files()


def test_centralized_job_trains_on_the_combined_split(store: Store, build: Build) -> None:
    (plan,) = JobFolder.read(build("combined").folder).plans
    assert plan.located(store.home).training_file == split_file(current(store.combined), "training")


def test_folder_holds_the_job_with_its_overrides(store: Store, build: Build) -> None:
    build("fedavg", rounds=4, learning_rate=0.5)
    spec = JobFolder.read(current(store.job_folder("fedavg"))).spec
    assert (spec.name, spec.kind, spec.rounds, spec.training.learning_rate) == ("fedavg", "federated", 4, 0.5)


def _server_arguments(store: Store) -> dict[str, Any]:
    config = json.loads((current(store.job_folder("fedavg")) / "app_server/config/config_fed_server.json").read_text())
    (workflow,) = config["workflows"]
    assert workflow["path"] == "fedsft_assets.federation.server.controller.FederatedSFT"
    arguments: dict[str, Any] = workflow["args"]
    return arguments


def test_server_is_told_the_sites_and_how_to_deal_with_them(store: Store, build: Build) -> None:
    build(
        "fedavg", rounds=4, min_sites=2, site_timeout=60.0, wire="bf16-diff", algorithm={"name": "fedopt", "beta1": 0.5}
    )
    arguments = _server_arguments(store)
    assert arguments.pop("algorithm").items() >= {"name": "fedopt", "beta1": 0.5}.items()
    limits = arguments.pop("limits")
    assert limits["work"] == {"local_epochs": 0.4, "max_local_steps": None, "batch_size": 8}
    assert limits["records"] == {
        site: len(read_records(split_file(current(store.splits(name)), "training")))
        for site, name in {"site-1": "alpaca", "site-2": "dolly", "site-3": "oasst1"}.items()
    }
    assert arguments == {
        "sites": ["site-1", "site-2", "site-3"],
        "num_rounds": 4,
        "base_model": str(archive_file(current(store.base_model("tiny"))).relative_to(store.home)),
        "min_sites": 2,
        "site_timeout": 60.0,
        "max_update_ratio": 10.0,
        "wire": "bf16-diff",
        "package": __version__,
    }


def test_server_gets_what_it_is_told_also_where_that_is_the_default(store: Store, build: Build) -> None:
    build("fedavg")
    server = FederatedSFT(**_server_arguments(store))
    assert (server.min_sites, server.site_timeout, server.wire) == (3, 1800.0, "fp32")
    assert server.algorithm == {"name": "fedavg"}


def test_nvflare_starts_a_job_with_as_few_sites_as_a_round_needs(store: Store, build: Build) -> None:
    build("fedavg", min_sites=1)
    assert json.loads((current(store.job_folder("fedavg")) / "meta.json").read_text())["min_clients"] == 1


def test_sites_are_told_how_to_train_and_what_to_send(store: Store, build: Build) -> None:
    build("fedavg", wire="bf16-diff", algorithm={"name": "fedprox", "mu": 0.5}, filters={"exclude": ["head"]})
    for plan in JobFolder.read(current(store.job_folder("fedavg"))).plans:
        assert plan.wire == "bf16-diff"
        assert plan.algorithm == FedProx(name="fedprox", mu=0.5)
        assert plan.filters.exclude == ["head"]


def test_folder_has_no_code(build: Build) -> None:
    folder = build("fedavg").folder
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json"}
    assert list(folder.rglob("custom")) == []
    config = json.loads((folder / "app_server/config/config_fed_server.json").read_text())
    (workflow,) = config["workflows"]
    assert workflow["path"] == CONTROLLER
    assert workflow["args"]["package"] == __version__


def test_folder_is_verified_as_it_was_built(store: Store, build: Build) -> None:
    build("fedavg")
    verify_job_folder(current(store.job_folder("fedavg")))
    folder = current(store.job_folder("fedavg"))
    shutil.copytree(folder, store.home / "elsewhere" / folder.name)
    verify_job_folder(store.home / "elsewhere" / folder.name)


def test_folder_is_read_once_and_for_all(store: Store, build: Build) -> None:
    report = build("fedavg")
    job = JobFolder.read(report.folder)
    assert [plan.site for plan in job.plans] == list(job.spec.sites)
    assert (job.home, job.digest) == (store.home, report.digest)
    assert job.base_model == archive_file(current(store.base_model("tiny")))
    assert job.absent_private_sites == []


@pytest.mark.parametrize(
    "name", ["job.json", "app_site-2/config/plan.json", "app_server/config/config_fed_server.json"]
)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes() + b" "), "has changed"),
        (lambda path: path.write_text("{}"), "has changed"),
        (lambda path: path.unlink(), "is missing"),
    ],
    ids=["one byte", "other content", "removed"],
)
def test_file_that_is_not_as_it_was_built_is_named(
    store: Store, build: Build, name: str, change: Callable[[Path], object], said: str
) -> None:
    build("fedavg")
    path = current(store.job_folder("fedavg")) / name
    change(path)
    with pytest.raises(JobFolderError, match=rf"^{path}: {said} since the job folder was built; build it again$"):
        verify_job_folder(current(store.job_folder("fedavg")))


def test_file_that_was_added_is_named(store: Store, build: Build) -> None:
    build("fedavg")
    added = current(store.job_folder("fedavg")) / "app_site-1" / "custom" / "more.py"
    added.parent.mkdir()
    added.write_text("")
    with pytest.raises(JobFolderError, match=rf"^{added}: was added since the job folder was built; build it again$"):
        verify_job_folder(current(store.job_folder("fedavg")))


def test_folder_without_its_manifest_is_not_as_it_was_built(store: Store, build: Build) -> None:
    build("fedavg")
    path = current(store.job_folder("fedavg")) / "manifest.json"
    path.unlink()
    with pytest.raises(JobFolderError, match=rf"^{path} does not exist; build the job folder again$"):
        verify_job_folder(current(store.job_folder("fedavg")))


def test_server_of_a_job_with_adapters_needs_no_base_model(store: Store, build: Build) -> None:
    (plan, *_) = JobFolder.read(build("fedavg", peft={"rank": 4}).folder).plans
    assert plan.training.peft == PeftSpec(rank=4)
    config = json.loads((current(store.job_folder("fedavg")) / "app_server/config/config_fed_server.json").read_text())
    assert not config["workflows"][0]["args"].get("base_model")


def test_site_runs_the_package_that_is_installed_there(store: Store, build: Build) -> None:
    build("alpaca")
    folder = current(store.job_folder("alpaca")) / "app_site-1"
    config = (folder / "config" / "config_fed_client.json").read_text()
    (executor,) = json.loads(config)["executors"]
    assert executor["executor"] == {"path": "fedsft_assets.federation.site.executor.InstalledTrainer", "args": {}}
    assert str(PROJECT) not in config


def test_same_job_and_data_give_the_same_digest(store: Store, build: Build) -> None:
    first = build("fedavg")
    assert build("fedavg") == first
    shutil.rmtree(store.job_folder("fedavg"))
    assert build("fedavg") == first


def test_digest_says_nothing_of_where_the_home_is(store: Store, build: Build, tmp_path: Path) -> None:
    first = build("fedavg").folder
    moved = Store(store.home.rename(tmp_path / "moved"))
    spec = JobSpec.load(PROJECT / "jobs" / "fedavg.yaml", list(DATASETS))
    again = build_job_folder(spec, TINY, moved).folder
    assert again == moved.home / first.relative_to(store.home)
    for path in again.rglob("*"):
        assert not path.is_file() or str(tmp_path).encode() not in path.read_bytes()


def test_digest_follows_the_job_and_the_data(store: Store, build: Build) -> None:
    first = build("alpaca").digest
    other_job = build("alpaca", rounds=3).digest
    with made_current(store.combined) as combined:
        for split in SPLITS:
            split_file(combined, split).write_text("{}\n")
    other_data = build("alpaca").digest
    assert len({first, other_job, other_data}) == 3


def test_data_version_is_that_of_what_is_trained_and_not_of_the_validation_split(store: Store, build: Build) -> None:
    first, centralized = build("alpaca"), build("combined")
    with made_current(store.combined) as combined:
        shutil.copytree(current(store.combined), combined, dirs_exist_ok=True)
        split_file(combined, "validation").write_text("{}\n")
    for before in (first, centralized):
        again = build(before.folder.parent.name)
        assert again.digest != before.digest
        assert again.data_version == before.data_version
    with made_current(store.processed("alpaca")) as alpaca:
        shutil.copytree(current(store.processed("alpaca")), alpaca, dirs_exist_ok=True)
        split_file(alpaca, "training").write_text("{}\n")
    assert len({first.data_version, build("alpaca").data_version, build("alpaca", rounds=3).data_version}) == 3


@pytest.mark.parametrize(("dataset", "split"), [("dolly", "training"), (COMBINED, "validation")])
def test_missing_split_is_named_and_the_old_folder_stays(store: Store, build: Build, dataset: str, split: str) -> None:
    before = build("fedavg").digest
    path = split_file(current(store.splits(dataset)), split)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"job fedavg, site-.: {path} does not exist; materialize its asset"):
        build("fedavg", rounds=3)
    assert folder_digest(current(store.job_folder("fedavg"))) == before


def test_versions_of_a_job_folder_stay_side_by_side(store: Store, build: Build) -> None:
    first, second = build("fedavg").folder, build("fedavg", rounds=3).folder
    assert first != second
    assert current(store.job_folder("fedavg")) == second
    for folder in (first, second):
        verify_job_folder(folder)
        assert folder.name == folder_digest(folder)
