"""A federation on machines with addresses of their own, where a site's link is cut during a round and restored."""

import errno
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedsft_assets.federation.runtimes.processes import MARK, stop_marked
from fedsft_assets.settings import PROJECT
from fedsft_assets.store import Store
from fedsft_assets.versions import current
from fedsft_assets_tests.namespaces import Network, network, why_not
from fedsft_assets_tests.provisioned import BIN, SERVER, SITES, Federation, environment, provision

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=str(why_not())),
]

STUDY = "study"
CUT_OFF = "site-2"
ROUNDS = 3
SECONDS_CUT = 30.0
RUN_A_JOB = """
import json, sys, time
from pathlib import Path
from fedsft_assets.federation.runtimes.production import Production, ProductionSettings
kit, job_folder, own, into = map(Path, sys.argv[1:])
with Production(ProductionSettings(startup_kit=kit), own) as runtime:
    runtime.prepare(["site-1", "site-2", "site-3"])
    job_id = runtime.submit(job_folder)
    while not (state := runtime.poll(job_id)).ended:
        time.sleep(0.5)
    print(state, flush=True)
    runtime.fetch(job_id, into)
sys.exit(0 if state.succeeded else 1)
"""


@contextmanager
def _federation(machines: Network, folder: Path, home: Path) -> Iterator[Federation]:
    """A federation that is starting, with the files of the study's home; the study waits, on a machine of its own."""
    inside = {name: machines.on(name) for name in (SERVER, *SITES)}
    variables = {name: {"FEDSFT_HOME": str(home)} for name in inside}
    kits = provision(folder, host=machines.addresses[SERVER], port=8002)
    federation = Federation(kits, folder, inside=inside, variables=variables)
    try:
        for name in federation.names:
            federation.start(name)
        yield federation
    finally:
        for name in (*federation.names, STUDY):
            stop_marked(federation.mark_of(name))


def _wait_until(said: str, federation: Federation, study: subprocess.Popen[bytes]) -> None:
    """Until the log of the site's part of the job has this text."""
    workspace = federation.kits.sites[CUT_OFF]
    while study.poll() is None:
        if any(said in log.read_text(errors="replace") for log in workspace.glob("*-*-*-*-*/log.txt")):
            return
        time.sleep(0.2)
    raise AssertionError(f"{CUT_OFF} never said {said!r}\n{federation.end_of_logs()}")


@pytest.mark.long
def test_a_site_whose_link_is_cut_during_a_round_comes_back_and_no_round_is_lost(
    store: Store, build: Callable[..., str], tmp_path: Path
) -> None:
    job = build("fedavg", rounds=ROUNDS, max_local_steps=20, max_evaluation_records=8)
    with (
        network([SERVER, *SITES, STUDY]) as machines,
        _federation(machines, tmp_path / "federation", store.home) as federation,
    ):
        machines.slow(CUT_OFF, "8mbit")  # a transfer takes seconds, so that a cut can meet it
        study = subprocess.Popen(
            [
                *machines.on(STUDY),
                *(str(BIN / "python"), "-c", RUN_A_JOB),
                *(
                    str(federation.kits.admin),
                    str(current(store.job_folder(job))),
                    str(tmp_path / "own"),
                    str(tmp_path / "got"),
                ),
            ],
            stdin=subprocess.DEVNULL,
            env={**environment(tmp_path), MARK: federation.mark_of(STUDY)},
            cwd=PROJECT,
        )
        _wait_until(f"{CUT_OFF} · val_loss", federation, study)
        time.sleep(1.0)
        machines.cut(CUT_OFF)
        time.sleep(SECONDS_CUT)
        assert study.poll() is None, federation.end_of_logs()
        machines.restore(CUT_OFF)
        assert study.wait() == 0, federation.end_of_logs()

    points = [json.loads(line) for line in (tmp_path / "got/journal.jsonl").read_text().splitlines()]
    losses = {(point["round"], point.get("site")) for point in points if point.get("name") == "val_loss"}
    assert losses == {(number, site) for number in range(ROUNDS + 1) for site in (None, *SITES)}


def _reach(machines: Network, start: str, end: str) -> int:
    """What a connection to a port where nobody listens says; it is refused by whoever is reached."""
    connect = "import socket, sys; s = socket.socket(); s.settimeout(2); print(s.connect_ex((sys.argv[1], 9)))"
    command = [*machines.on(start), str(BIN / "python"), "-c", connect, machines.addresses[end]]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_machines_reach_each_other_unless_a_link_is_cut_and_nothing_of_them_is_left() -> None:
    with network(["one", "two"]) as machines:
        assert _reach(machines, "one", "two") == errno.ECONNREFUSED
        machines.cut("two")
        assert _reach(machines, "one", "two") != errno.ECONNREFUSED
        machines.restore("two")
        assert _reach(machines, "one", "two") == errno.ECONNREFUSED
        names = {machines.switch, *machines.namespaces.values()}
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert not names & {line.split()[0] for line in left.splitlines()}
