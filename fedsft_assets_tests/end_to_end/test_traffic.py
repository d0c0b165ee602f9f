"""What a job reports that it cost: bytes as the sockets carried them, and the costs of earlier attempts."""

import shutil
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from fedsft_assets.federation.protocol.costs import CPU_SECONDS
from fedsft_assets.federation.protocol.events import Event
from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.federation.protocol.messages import SITE_HOME
from fedsft_assets.federation.protocol.points import VAL_LOSS, Point
from fedsft_assets.federation.supervisor.launch import run_job
from fedsft_assets.federation.supervisor.workspace import Workspace
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.specs.dataset import COMBINED
from fedsft_assets.store import Store, archive_file, split_file
from fedsft_assets.tracking.journal_points import JournalPoints
from fedsft_assets.versions import current
from fedsft_assets_tests.counting_proxy import CountingProxy
from fedsft_assets_tests.prepared import TINY
from fedsft_assets_tests.provisioned import SERVER, Federation, events_of_job, provision, running
from fedsft_assets_tests.tracking.server import unused_port

pytestmark = pytest.mark.slow

SITE, DATASET = "site-1", "alpaca"
ROUNDS = 7  # the tiny model, of about 4 MB, travels eight times to the site and seven times back
LEAST = 50_000_000
TOLERANCE = 0.01


def test_traffic_of_a_site_is_what_its_sockets_carried(store: Store, build: Callable[..., str], tmp_path: Path) -> None:
    """Over mutual TLS, with all that NVFlare sends besides tensors while the job runs."""
    job = build(DATASET, rounds=ROUNDS, max_local_steps=1, max_evaluation_records=8)
    home = _site_home(store, tmp_path / "files")
    port = unused_port()
    with CountingProxy(port) as proxy:
        kits = provision(tmp_path / "federation", sites=[SITE], port=port, ports_of_sites={SITE: proxy.port})
        variables = {name: {SITE_HOME: str(home)} for name in (SERVER, SITE)}
        with running(Federation(kits, tmp_path / "federation", variables=variables)) as federation:
            before = proxy.carried
            *_, report = events_of_job(federation, store, job)
            carried = proxy.carried - before
    assert isinstance(report, JobReport)
    assert report.traffic is not None
    traffic = report.traffic[SITE]
    assert carried.up + carried.down >= LEAST
    assert traffic["sent"] == pytest.approx(carried.up, rel=TOLERANCE)
    assert traffic["received"] == pytest.approx(carried.down, rel=TOLERANCE)
    assert report.transferred is not None
    assert report.transferred[-1] == sum(traffic.values())


def test_costs_of_an_attempt_that_was_stopped_still_count(store: Store, build: Callable[..., str]) -> None:
    rounds = 3
    job = build(DATASET, rounds=rounds, max_local_steps=1, max_evaluation_records=8)
    workspace = Workspace(store.flare(job))
    attempt = _attempt(job, store)
    for event in attempt:
        if isinstance(event, Point) and (event.name, event.site, event.round) == (VAL_LOSS, None, 1):
            break
    attempt.close()
    points = JournalPoints(workspace.journal).read()
    spent = max(point.value for point in points if point.name == CPU_SECONDS)

    *_, report = _attempt(job, store)
    assert isinstance(report, JobReport)
    assert report.traffic is not None
    weights = LanguageModel.load(archive_file(current(store.base_model(TINY.name)))).distinct_parameters()
    size = sum(weight.nbytes for weight in weights.values())
    assert report.traffic[SITE]["received"] > 0.98 * (rounds + 1) * size
    assert report.traffic[SITE]["sent"] > 0.98 * rounds * size
    assert report.cpu_seconds is not None
    assert report.cpu_seconds > 1.5 * spent  # both attempts import and load everything
    assert report.elapsed is not None
    assert report.elapsed == sorted(report.elapsed)
    assert report.elapsed[-1] < report.seconds
    execution = workspace.execution()
    assert execution is not None
    assert len(execution.attempts) == 2


def _attempt(job: str, store: Store) -> Generator[Event, None, None]:
    yield from run_job(
        current(store.job_folder(job)),
        store.flare(job),
        split_file(current(store.combined), "testing"),
        store.checkpoint(job),
    )


def _site_home(store: Store, home: Path) -> Path:
    """The files that the job needs at the site and at the server."""
    shutil.copytree(current(store.combined), home / "datasets" / COMBINED)
    shutil.copytree(current(store.splits(DATASET)), home / "datasets" / DATASET)
    (home / "base_models").mkdir()
    shutil.copyfile(archive_file(current(store.base_model(TINY.name))), home / "base_models" / f"{TINY.name}.nemo")
    return home
