"""A job in a provisioned federation: server and sites as separate processes with mutual TLS, all on loopback.

The sites have what `pip install '.[site]'` brings and files of their own; the study's are out of their reach.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedsft_assets.federation.protocol.events import Event, JobError
from fedsft_assets.federation.protocol.job_report import MODEL_FILE, JobReport
from fedsft_assets.federation.protocol.messages import LAST_MODEL
from fedsft_assets.federation.runtimes.interface import UnavailableError
from fedsft_assets.federation.runtimes.production import Production
from fedsft_assets.federation.site.files import SITE_HOME
from fedsft_assets.model.base_model import create_base_model
from fedsft_assets.specs.dataset import COMBINED
from fedsft_assets.specs.runtime import ProductionSettings
from fedsft_assets.store import SPLITS, Store, archive_file, split_file
from fedsft_assets.versions import current
from fedsft_assets_tests.environments import environment_of, installing
from fedsft_assets_tests.prepared import TINY
from fedsft_assets_tests.provisioned import SERVER, SITES, Federation, events_of_job, provision, running
from fedsft_assets_tests.shipped import DATASETS
from fedsft_assets_tests.sockets import scanned

pytestmark = pytest.mark.slow

SMALL = {"rounds": 2, "max_local_steps": 2, "max_evaluation_records": 8}
DATASET_OF = dict(zip(SITES, DATASETS, strict=True))


@pytest.fixture(scope="module")
def federation(prepared_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("federation")
    store = Store(prepared_home)
    bins = {SERVER: environment_of(installing("server"), folder / "server_environment")}
    bins |= dict.fromkeys(SITES, environment_of(installing("site"), folder / "site_environment"))
    homes = {name: folder / "homes" / name for name in bins}
    for name, home in homes.items():
        _copy(archive_file(current(store.base_model(TINY.name))), home / "base_models" / f"{TINY.name}.nemo")
        if name in SITES:
            _copy(split_file(current(store.combined), "validation"), home / "datasets" / COMBINED / "validation.jsonl")
            shutil.copytree(current(store.splits(DATASET_OF[name])), home / "datasets" / DATASET_OF[name])
    variables = {name: {SITE_HOME: str(home)} for name, home in homes.items()}
    with running(Federation(provision(folder), folder, variables=variables, bins=bins)) as started:
        yield started


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


@pytest.fixture
def job(store: Store, build: Callable[..., str]) -> str:
    """A small job, of whose data and base model nothing is left where the plan was made."""
    name = build("fedavg", **SMALL)
    for dataset in DATASETS:
        shutil.rmtree(current(store.processed(dataset)))
    for split in set(SPLITS) - {"testing"}:
        split_file(current(store.combined), split).unlink()
    return name


def test_a_job_ends_with_its_files_while_all_listen_on_loopback_alone(
    federation: Federation, store: Store, job: str, tmp_path: Path
) -> None:
    settings = ProductionSettings(startup_kit=federation.kits.admin)
    lines: list[str] = []
    with Production(settings, tmp_path / "own") as runtime, scanned(*federation.marks) as scan:
        runtime.prepare(list(SITES))
        job_id = runtime.submit(current(store.job_folder(job)))
        while not (state := runtime.poll(job_id)).ended:
            lines += runtime.new_lines(job_id)
            time.sleep(0.3)
        lines += runtime.new_lines(job_id)
        assert state.succeeded, (state, federation.end_of_logs())
        runtime.fetch(job_id, tmp_path / "fetched")

    assert (tmp_path / "fetched" / LAST_MODEL).stat().st_size > 1_000_000
    points = [json.loads(line) for line in lines]
    losses = {(point["round"], point.get("site")) for point in points if point.get("name") == "val_loss"}
    assert losses == {(number, site) for number in range(SMALL["rounds"] + 1) for site in (None, *SITES)}
    assert scan.beyond_loopback == []
    # The server's port, and one or two of the job's process at the server and at each site.
    assert len({(one.address, one.port) for one in scan.sockets}) > 1 + len(SITES)


def _run(federation: Federation, store: Store, job: str) -> Event:
    """As the study runs it; the last event."""
    *_, last = events_of_job(federation, store, job)
    return last


def test_the_study_gets_a_checkpoint_from_sites_whose_data_it_cannot_see(
    federation: Federation, store: Store, job: str
) -> None:
    with scanned(*federation.marks, str(store.flare(job))) as scan:
        report = _run(federation, store, job)
    assert scan.beyond_loopback == []
    assert {"fedsft_assets.federation.supervisor.supervisor", "fedsft_assets.federation.site.process"} <= scan.programs
    assert isinstance(report, JobReport)
    assert len(report.val_loss) == SMALL["rounds"] + 1
    assert report.last_val_loss < report.base_val_loss
    assert (store.checkpoint(job) / MODEL_FILE).is_file()


def test_a_site_without_the_data_of_a_job_says_what_is_missing(federation: Federation, store: Store, job: str) -> None:
    missing = federation.folder / "homes/site-2/datasets" / DATASET_OF["site-2"] / "training.jsonl"
    aside = missing.with_suffix(".aside")
    missing.rename(aside)
    try:
        with pytest.raises(JobError) as raised:
            _run(federation, store, job)
    finally:
        aside.rename(missing)
    assert f"site-2: training_file: {missing} is missing; split the site's data with 'fedsft-site split" in str(
        raised.value
    )


def test_a_site_whose_base_model_has_another_shape_says_in_which_tensors(
    federation: Federation, store: Store, job: str
) -> None:
    own = federation.folder / f"homes/site-2/base_models/{TINY.name}.nemo"
    aside = own.with_suffix(".aside")
    own.rename(aside)
    try:
        create_base_model(TINY, own, seed=1234, texts=["so few words make a smaller vocabulary"] * 9)
        with pytest.raises(JobError) as raised:
            _run(federation, store, job)
    finally:
        aside.replace(own)
    assert "the trainer of site-2 failed" in str(raised.value)
    assert "lm.transformer.wte.weight" in str(raised.value)
    assert not raised.value.retryable


def test_a_site_that_is_not_connected_is_named(federation: Federation, tmp_path: Path) -> None:
    settings = ProductionSettings.model_validate(
        {"startup_kit": federation.kits.admin, "timeouts": {"sites": 1, "connect": 60}}
    )
    with (
        Production(settings, tmp_path / "own") as runtime,
        pytest.raises(UnavailableError, match="site-9 is not connected"),
    ):
        runtime.prepare([*SITES, "site-9"])
