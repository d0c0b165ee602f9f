"""The traffic that a job reports, beside what the sockets between server and site have carried."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.federation.protocol.messages import SITE_HOME
from fedsft_assets.specs.dataset import COMBINED
from fedsft_assets.store import Store, archive_file
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


def _site_home(store: Store, home: Path) -> Path:
    """The files that the job needs at the site and at the server."""
    shutil.copytree(current(store.combined), home / "datasets" / COMBINED)
    shutil.copytree(current(store.splits(DATASET)), home / "datasets" / DATASET)
    (home / "base_models").mkdir()
    shutil.copyfile(archive_file(current(store.base_model(TINY.name))), home / "base_models" / f"{TINY.name}.nemo")
    return home
