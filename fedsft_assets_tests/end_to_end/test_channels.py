"""What a job's processes listen at is what docs/security.md says, and another account gets nothing there."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedsft_assets.federation.protocol.events import Event
from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.federation.protocol.journal import Progress
from fedsft_assets.federation.runtimes.poc.system import PocSystem
from fedsft_assets.federation.runtimes.processes import marked_processes
from fedsft_assets.federation.supervisor.launch import run_job
from fedsft_assets.process_env import home_environment
from fedsft_assets.settings import PROJECT
from fedsft_assets.specs.runtime import PocSettings, ProductionSettings, RuntimeSettings
from fedsft_assets.store import Store, split_file
from fedsft_assets.versions import current
from fedsft_assets_tests import stranger
from fedsft_assets_tests.provisioned import SERVER, Federation, provision, running
from fedsft_assets_tests.sockets import OpenSocket, Scan, scanned

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(stranger.why_not() is not None, reason=str(stranger.why_not())),
]

SITE = "site-1"
SMALL = {"rounds": 60, "max_local_steps": 4, "max_evaluation_records": 8}
_ROUNDS_ALIKE = 10  # places differ in the last bits of floats, and more with every round
# While a job of one site trains; as the table in docs/security.md. Processes of a simulation are forks of one.
_FLARE = {
    "nvflare.private.fed.app.server.server_train tcp": 1,  # mutual TLS
    "nvflare.private.fed.app.server.server_train unix": 1,
    "nvflare.private.fed.app.client.client_train unix": 1,
    "nvflare.private.fed.app.client.worker_process unix": 1,
}
LISTENERS = {
    "simulator": {"fedsft_assets.federation.runtimes.simulator.fork_server unix": 4},
    "poc": {**_FLARE, "nvflare.private.fed.app.client.client_train unix": 3},  # all sites of the study are there
    "production": _FLARE,
}


@dataclass
class Study:
    """A job that is run, and whatever runs it."""

    store: Store
    job: str
    runtime: RuntimeSettings
    marks: list[str]

    def run(self, when_it_trains: Callable[[], None]) -> JobReport:
        last: Event | None = None
        attack = threading.Thread(target=when_it_trains)
        for last in run_job(
            job=current(self.store.job_folder(self.job)),
            workspace=self.store.flare(self.job),
            testing_file=split_file(current(self.store.combined), "testing"),
            into=self.store.checkpoint(self.job),
            runtime=self.runtime,
        ):
            if isinstance(last, Progress) and "step" in last.text and attack.ident is None:
                attack.start()
        attack.join()
        assert isinstance(last, JobReport)
        return last


@contextmanager
def _place(runtime: str, store: Store, job: str, folder: Path) -> Iterator[Study]:
    study = Study(store, job, RuntimeSettings(name=runtime), [str(store.flare(job))])  # type: ignore[arg-type]
    if runtime == "simulator":
        study.runtime = RuntimeSettings(threads_per_trainer=1)
        yield study
    elif runtime == "poc":
        system = PocSystem(store.home / "poc", PocSettings(), home_environment(store.home))
        system.start([SITE])
        study.marks.append(system.mark)
        try:
            yield study
        finally:
            system.stop()
    else:
        variables = {name: {"FEDSFT_HOME": str(store.home)} for name in (SERVER, SITE)}  # where all files are
        with running(Federation(provision(folder, sites=[SITE]), folder, variables=variables)) as federation:
            study.marks += federation.marks
            production = ProductionSettings(startup_kit=federation.kits.admin)
            study.runtime = RuntimeSettings(name="production", production=production)
            yield study


@pytest.fixture(scope="module")
def losses() -> dict[str, list[float]]:
    """Of the runtimes that have had their turn."""
    return {}


@pytest.mark.parametrize(
    "runtime", ["simulator", *(pytest.param(name, marks=pytest.mark.long) for name in ("poc", "production"))]
)
def test_another_account_gets_nothing_from_a_running_job(
    runtime: str, store: Store, build: Callable[..., str], tmp_path: Path, losses: dict[str, list[float]]
) -> None:
    job = build("alpaca", **SMALL)
    secret, trace = tmp_path / "secret", Path("/tmp") / f"fedsft-trace-{tmp_path.name}-{runtime}"
    secret.write_text("of a site")
    secret.chmod(0o600)
    now, then, got = Scan(), Scan(), list[stranger.Got]()
    ways: list[list[str]] = []

    with _place(runtime, store, job, tmp_path / "federation") as study:

        def attack() -> None:
            _look(now, study)
            for one in now.sockets:
                ways.extend(_ways(one, str(secret), str(trace)))
            got.extend(stranger.tried_as_nobody(ways))
            _look(then, study)

        with scanned(*study.marks) as whole:
            report = study.run(attack)

    assert Counter(f"{one.program} {one.kind}" for one in now.sockets) == LISTENERS[runtime]
    assert now.sockets == then.sockets
    assert {f"{one.program} {one.kind}" for one in whole.sockets} == set(LISTENERS[runtime])
    assert whole.beyond_loopback == []
    for way, what in zip(ways, got, strict=True):
        assert "of a site" not in what.said, way
        if not _is_of_the_server(way, now):  # which answers everybody that it does not know them
            assert not what.connected, (way, what)
    assert not trace.exists()
    assert report.rounds == SMALL["rounds"]
    losses[runtime] = report.val_loss[:_ROUNDS_ALIKE]
    assert losses[runtime] == pytest.approx(next(iter(losses.values())), abs=1e-5)


def _look(scan: Scan, study: Study) -> None:
    scan.look(process for mark in study.marks for process in marked_processes(mark))


def _ways(one: OpenSocket, secret: str, trace: str) -> list[list[str]]:
    """All that a stranger could try at a socket."""
    cells = ("server", "server.simulate_job", SITE, f"{SITE}.simulate_job")
    if one.kind == "tcp":
        return [
            *(
                ["join", f"{scheme}://localhost:{one.port}", cell, secret]
                for scheme in ("tcp", "grpc")
                for cell in cells
            ),
            ["pickle", str(one.port), trace],
        ]
    number = one.address.rpartition("-")[2]
    found = [["call", one.address], ["call", one.address, "\0" * 64], ["fork", one.address, trace]]
    if number.isdecimal():
        found += [["join", f"tcp://localhost:{number}", cell, secret] for cell in cells]
    return found


def _is_of_the_server(way: list[str], now: Scan) -> bool:
    return any(str(one.port) in " ".join(way) for one in now.sockets if one.kind == "tcp")


def test_all_listeners_are_in_the_document() -> None:
    said = (PROJECT / "docs/security.md").read_text(encoding="utf-8")
    for programs in LISTENERS.values():
        for program in programs:
            assert f"`{program.split()[0].rpartition('.')[2]}`" in said
