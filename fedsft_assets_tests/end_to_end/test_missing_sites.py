"""Rounds that go on without a site, and jobs that cannot."""

import contextlib
import signal
from collections.abc import Callable

import psutil
import pytest

from fedsft_assets.federation import job_folder
from fedsft_assets.federation.protocol.events import JobError
from fedsft_assets.federation.protocol.job_report import JobReport
from fedsft_assets.federation.protocol.journal import Missed, Progress
from fedsft_assets.federation.runtimes.processes import marked_processes
from fedsft_assets.federation.supervisor import launch
from fedsft_assets.federation.supervisor.launch import run_job
from fedsft_assets.specs.plan import SitePlan
from fedsft_assets.store import Store, split_file
from fedsft_assets.versions import current

pytestmark = pytest.mark.slow

_SHORT = {"rounds": 4, "max_local_steps": 20, "max_evaluation_records": 8}


_TRAINER, _SITE = "fedsft_assets.federation.site.process", "fedsft_assets.federation.runtimes.simulator.site"


def _processes(store: Store, job: str, site: str, module: str) -> list[psutil.Process]:
    """The process that runs a module for a site, by its command line, and the fork that it stands for."""
    found = []
    for process in marked_processes(str(store.flare(job))):
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if (module in words and site in words) or (module == _TRAINER and f"app_{site}" in process.cwd()):
                found.append(process)
    assert found, f"no {module} of {site}"
    return found


def _run_and_send(
    store: Store, job: str, site: str, sign: signal.Signals, module: str = _TRAINER
) -> tuple[list[Missed], JobReport]:
    """Run the job; a process of a site gets a signal when its trainer begins to train its second round."""
    sent, missed, report = False, [], None
    for event in run_job(
        current(store.job_folder(job)),
        store.flare(job),
        split_file(current(store.combined), "testing"),
        store.checkpoint(job),
    ):
        if (
            isinstance(event, Progress)
            and not sent
            and f"{site} · val_loss " in event.text
            and "after 1 of" in event.text
        ):
            for process in _processes(store, job, site, module):
                with contextlib.suppress(psutil.NoSuchProcess):  # it has ended with the one before
                    process.send_signal(sign)
            sent = True
        if isinstance(event, Missed):
            missed.append(event)
        if isinstance(event, JobReport):
            report = event
    assert sent
    assert report is not None
    return missed, report


def test_rounds_go_on_without_a_trainer_that_was_killed(store: Store, build: Callable[..., str]) -> None:
    job = build("fedavg", min_sites=2, **_SHORT)
    missed, report = _run_and_send(store, job, "site-2", signal.SIGKILL)
    assert report.missed.keys() == {"site-2"}
    assert report.missed["site-2"] == [2, 3, 4]
    assert {one.site for one in missed} == {"site-2"}
    assert "its trainer exited" in missed[0].reason


def test_rounds_go_on_without_a_site_whose_own_process_was_killed(store: Store, build: Callable[..., str]) -> None:
    job = build("fedavg", min_sites=2, **_SHORT)
    missed, report = _run_and_send(store, job, "site-2", signal.SIGKILL, _SITE)
    assert report.missed == {"site-2": [2, 3, 4]}
    assert missed[0].reason == "disconnected"
    assert marked_processes(str(store.flare(job))) == []


@pytest.mark.long
def test_rounds_go_on_without_a_trainer_that_hangs(store: Store, build: Callable[..., str]) -> None:
    job = build("fedavg", min_sites=2, site_timeout=20, **_SHORT)
    missed, report = _run_and_send(store, job, "site-3", signal.SIGSTOP)
    assert report.missed.keys() == {"site-3"}
    assert missed[0].reason.startswith("no message for ")
    assert missed[0].reason.endswith("(site_timeout is 20 s)")
    assert marked_processes(str(store.flare(job))) == []


def test_too_few_sites_fail_the_job_with_each_reason(store: Store, build: Callable[..., str]) -> None:
    job = build("fedavg", min_sites=3, site_timeout=20, **_SHORT)
    with pytest.raises(JobError) as failure:
        _run_and_send(store, job, "site-1", signal.SIGSTOP)
    assert "has results of 2 of 3 sites; min_sites is 3" in str(failure.value)
    assert "site-1: no message for " in str(failure.value)
    assert failure.value.retryable
    assert marked_processes(str(store.flare(job))) == []


def test_job_folder_that_was_changed_is_not_run(store: Store, build: Callable[..., str]) -> None:
    job = build("fedavg", **_SHORT)
    plan = current(store.job_folder(job)) / "app_site-2" / "config" / "plan.json"
    plan.write_text(plan.read_text().replace('"seed": 1234', '"seed": 1235'))
    with pytest.raises(JobError, match=f"{plan}: has changed since the job folder was built; build it again"):
        _run_and_send(store, job, "site-1", signal.SIGKILL)
    assert not store.flare(job).exists()


@pytest.mark.parametrize("where", ["server", "site"])
def test_another_version_of_this_package_is_refused(
    store: Store, build: Callable[..., str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    if where == "server":
        monkeypatch.setattr(job_folder, "__version__", "9.9.9")
    job = build("alpaca", **_SHORT)
    if where == "site":
        for path in current(store.job_folder(job)).glob("app_*/config/plan.json"):
            plan = SitePlan.model_validate_json(path.read_text())
            path.write_text(plan.model_copy(update={"package": "9.9.9"}).model_dump_json())
        monkeypatch.setattr(launch, "verify_job_folder", lambda _: None)  # as whoever has built it would run it
    with pytest.raises(JobError, match=rf"the job was built with fedsft-assets 9\.9\.9, this {where} has"):
        _run_and_send(store, job, "site-1", signal.SIGKILL)
