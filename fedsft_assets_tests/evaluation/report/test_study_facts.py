"""Versions and licenses of a study's data."""

from pathlib import Path

import pytest

from fedsft_assets.data.split_report import SplitReport
from fedsft_assets.evaluation.report.study_facts import NOT_STATED, dataset_facts, terms
from fedsft_assets.specs.dataset import DatasetSpec
from fedsft_assets.specs.job import JobSpec, SiteSpec
from fedsft_assets.store import Store
from fedsft_assets.versions import current
from fedsft_assets_tests.prepared import prepare_home
from fedsft_assets_tests.shipped import DATASETS


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return prepare_home(tmp_path_factory.mktemp("home"))


@pytest.fixture
def digest(store: Store) -> str:
    return SplitReport.read(current(store.combined)).digest


def test_licenses_of_the_shipped_datasets_are_those_that_their_publishers_state() -> None:
    assert {name: spec.license for name, spec in DATASETS.items()} == {
        "alpaca": "CC BY-NC 4.0",
        "dolly": "CC BY-SA 3.0",
        "oasst1": "Apache 2.0",
    }


def test_version_and_counts_are_those_that_were_tested_on(store: Store, digest: str) -> None:
    found = dataset_facts(store, digest, DATASETS.values(), "hub")
    assert found is not None
    assert [one.name for one in found] == ["alpaca", "dolly", "oasst1"]
    for one in found:
        version = current(store.processed(one.name))
        assert (one.version, one.counts) == (version.name, SplitReport.read(version).counts)
        assert one.license == DATASETS[one.name].license
    assert found[0].source == f"the hub: tatsu-lab/alpaca at {DATASETS['alpaca'].revision[:12]}"


def test_sample_is_not_said_to_be_the_published_data(store: Store, digest: str) -> None:
    found = dataset_facts(store, digest, DATASETS.values(), "sample")
    assert found is not None
    assert {one.license for one in found} == {"generated sample: the published license does not apply"}


def test_own_files_have_the_license_that_their_file_states_or_none(tmp_path: Path, store: Store, digest: str) -> None:
    columns = {"instruction": "q", "response": "a"}
    own = {"path": tmp_path / "x.csv", "format": "csv", "columns": columns}
    specs = [DatasetSpec.model_validate({**own, "name": "alpaca"}), DATASETS["dolly"]]
    found = dataset_facts(store, digest, specs, "sample")
    assert found is not None
    assert (found[0].license, found[0].source) == (NOT_STATED, str(tmp_path / "x.csv"))
    assert (found[2].license, found[2].source) == (NOT_STATED, "no longer in the study")


def test_splits_that_are_gone_have_no_facts(store: Store) -> None:
    assert dataset_facts(store, "0" * 64, DATASETS.values(), "hub") is None


def test_model_has_the_terms_of_all_data_that_it_was_trained_on(store: Store, digest: str) -> None:
    data = dataset_facts(store, digest, DATASETS.values(), "hub")
    assert data is not None

    def said(**sites: SiteSpec) -> str:
        return terms(JobSpec(name="job", description="", sites=sites, rounds=1), data)

    assert said(a=SiteSpec(dataset="alpaca")) == "CC BY-NC 4.0 (alpaca)"
    everything = "CC BY-NC 4.0 (alpaca); CC BY-SA 3.0 (dolly); Apache 2.0 (oasst1)"
    assert said(a=SiteSpec(dataset="combined")) == everything
    private = said(a=SiteSpec(dataset="dolly"), b=SiteSpec(dataset="letters", private=True))
    assert private == "CC BY-SA 3.0 (dolly); known to the sites alone (letters)"
