"""Starting a job's supervisor and listening to it; whole jobs are in the end-to-end tests."""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedsft_assets.federation.job_folder import JobFolder, build_job_folder
from fedsft_assets.federation.protocol.events import Event, Failed, JobError, encode
from fedsft_assets.federation.protocol.journal import Progress
from fedsft_assets.federation.protocol.points import Point
from fedsft_assets.federation.runtimes.processes import MARK, marked_processes
from fedsft_assets.federation.supervisor.launch import begin_execution, read_job_folder, run_job
from fedsft_assets.federation.supervisor.workspace import Workspace
from fedsft_assets.specs.dataset import COMBINED
from fedsft_assets.specs.job import JobSpec, SiteSpec
from fedsft_assets.specs.model_preset import PRESETS
from fedsft_assets.specs.runtime import RuntimeSettings
from fedsft_assets.store import SPLITS, Store, split_file
from fedsft_assets.versions import current
from fedsft_assets_tests.federation.protocol.test_job_report import REPORT
from fedsft_assets_tests.prepared import made_current

POINT = Point("val_loss", 7.0, 0, 0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A home with the job folder of `quick`."""
    store = Store(tmp_path / "home")
    for dataset in ("alpaca", COMBINED):
        with made_current(store.splits(dataset)) as splits:
            for split in SPLITS:
                split_file(splits, split).write_text("{}\n")
    _make_base_model(store, "a base model")
    _build(store)
    return store


def _make_base_model(store: Store, content: str) -> None:
    with made_current(store.base_model("tiny")) as base_model:
        (base_model / "tiny.nemo").write_text(content)


def _job(store: Store) -> JobFolder:
    return read_job_folder(current(store.job_folder("quick")))


def _build(store: Store, rounds: int = 1) -> None:
    spec = JobSpec(name="quick", description="", rounds=rounds, sites={"site-1": SiteSpec(dataset="alpaca")})
    build_job_folder(spec, PRESETS["tiny"], store)


def test_private_data_that_is_elsewhere_is_asked_for_in_production_only(store: Store) -> None:
    spec = JobSpec(name="quick", description="", rounds=1, sites={"site-1": SiteSpec(dataset="patients", private=True)})
    build_job_folder(spec, PRESETS["tiny"], store)
    folder, workspace = current(store.job_folder("quick")), store.flare("quick")
    with pytest.raises(JobError) as error:
        begin_execution(read_job_folder(folder), workspace, "simulator")
    assert str(error.value) == (
        f"{folder}: the data of site-1 is private and not on this machine; run the job where it is,"
        " in the runtime 'production'"
    )
    assert begin_execution(read_job_folder(folder), workspace, "production").subject["runtime"] == "production"


Supervise = Callable[..., "list[Event]"]


@pytest.fixture
def supervised_by(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Supervise:
    """Runs the job with a script in the supervisor's place; gives its events, or raises as `run_job` does."""

    def run(script: str, take: int | None = None, **arguments: object) -> list[Event]:
        program = tmp_path / "supervisor"
        program.write_text(f"#!{sys.executable}\nimport json, os, signal, subprocess, sys, time\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        events = run_job(
            current(store.job_folder("quick")),
            store.flare("quick"),
            Path("testing.jsonl"),
            Path("checkpoint"),
            **arguments,
        )
        taken = []
        with contextlib.closing(events):
            for event in events:
                taken.append(event)
                if len(taken) == take:
                    break
        return taken

    return run


def _says(*events: Event) -> str:
    return "".join(f"print({encode(event)!r}, flush=True)\n" for event in events)


def test_events_of_the_supervisor_come_through_and_the_report_is_the_last(supervised_by: Supervise) -> None:
    assert supervised_by(_says(Progress("é"), POINT, REPORT)) == [Progress("é"), POINT, REPORT]


def test_supervisor_is_told_what_to_do_and_in_which_environment(supervised_by: Supervise, store: Store) -> None:
    script = (
        f"print(json.dumps(dict(event='progress', text=json.dumps([sys.argv[1:], dict(os.environ)]))))\n{_says(REPORT)}"
    )
    said, _ = supervised_by(script, runtime=RuntimeSettings(name="poc", threads_per_trainer=3))
    assert isinstance(said, Progress)
    arguments, environment = json.loads(said.text)
    options = dict(zip(arguments[2::2], arguments[3::2], strict=True))
    assert arguments[:2] == ["-m", "fedsft_assets.federation.supervisor.supervisor"]
    assert options == {
        "--job-folder": str(current(store.job_folder("quick"))),
        "--workspace": str(store.flare("quick")),
        "--testing-file": "testing.jsonl",
        "--into": "checkpoint",
        "--runtime": RuntimeSettings(name="poc", threads_per_trainer=3).model_dump_json(),
    }
    assert environment["FEDSFT_HOME"] == str(store.home)
    assert environment["HF_HOME"] == str(store.home / "cache" / "huggingface")
    assert environment["PATH"] == os.environ["PATH"]
    assert environment[MARK].startswith(str(store.flare("quick")))


@pytest.mark.parametrize("lost", [True, False])
def test_failure_that_the_supervisor_tells_is_raised_as_it_is(supervised_by: Supervise, lost: bool) -> None:
    with pytest.raises(JobError, match=r"^the trainer of site-1 failed:\nTraceback: é$") as failure:
        supervised_by(_says(POINT, Failed("the trainer of site-1 failed:\nTraceback: é", lost)) + "sys.exit(1)")
    assert failure.value.retryable == lost


def test_supervisor_that_crashes_shows_its_traceback_and_another_attempt_would_not_help(
    supervised_by: Supervise,
) -> None:
    with pytest.raises(JobError) as failure:
        supervised_by(_says(POINT) + "raise OSError('disk full')")
    assert str(failure.value).startswith("the job's supervisor ended with exit code 1:\nTraceback")
    assert str(failure.value).endswith("OSError: disk full")
    assert not failure.value.retryable


def test_supervisor_that_is_killed_is_lost(supervised_by: Supervise) -> None:
    with pytest.raises(JobError, match="the job's supervisor ended with exit code -9") as failure:
        supervised_by(_says(POINT) + "os.kill(os.getpid(), signal.SIGKILL)")
    assert failure.value.retryable


def test_supervisor_that_ends_without_a_report_has_failed(supervised_by: Supervise) -> None:
    with pytest.raises(JobError, match="ended with exit code 0"):
        supervised_by(_says(POINT))


def test_report_of_a_supervisor_that_fails_afterwards_does_not_count(supervised_by: Supervise) -> None:
    with pytest.raises(JobError, match="ended with exit code 3"):
        supervised_by(_says(REPORT) + "sys.exit(3)")


_CHILD = "subprocess.Popen(['sleep', '600'], start_new_session=True, stdout=subprocess.DEVNULL)\n"


@pytest.mark.parametrize(
    "script", [_CHILD + _says(REPORT), _CHILD + _says(Failed("why"))], ids=["it succeeds", "it fails"]
)
def test_nothing_that_the_supervisor_started_outlives_the_job(
    supervised_by: Supervise, store: Store, script: str
) -> None:
    with contextlib.suppress(JobError):
        supervised_by(script)
    assert marked_processes(str(store.flare("quick"))) == []


def test_closing_the_events_ends_the_supervisor_and_what_it_started(supervised_by: Supervise, store: Store) -> None:
    assert supervised_by(_CHILD + _says(POINT) + "time.sleep(600)", take=1) == [POINT]
    assert marked_processes(str(store.flare("quick"))) == []


def test_job_folder_that_does_not_exist_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    missing, workspace = tmp_path / "job_folders" / "fedavg", tmp_path / "flare" / "fedavg"
    with pytest.raises(JobError, match=f"^{missing / 'manifest.json'} does not exist; build the job folder again$"):
        list(run_job(missing, workspace, tmp_path / "testing.jsonl", tmp_path / "checkpoint"))
    assert list(tmp_path.iterdir()) == []


def test_job_folder_that_was_changed_is_not_run(store: Store) -> None:
    path = current(store.job_folder("quick")) / "app_site-1" / "config" / "plan.json"
    path.write_text(path.read_text().replace('"rounds": 1', '"rounds": 9'))
    with pytest.raises(JobError, match=f"^{path}: has changed since the job folder was built; build it again$"):
        begin_execution(_job(store), store.flare("quick"), "simulator")
    assert not store.flare("quick").exists()


def test_base_model_that_is_missing_is_named(store: Store) -> None:
    version = current(store.base_model("tiny"))
    shutil.rmtree(version)
    with pytest.raises(JobError, match=f"^{version}: does not exist"):
        begin_execution(_job(store), store.flare("quick"), "simulator")


def test_base_model_that_was_changed_is_not_run(store: Store) -> None:
    version = current(store.base_model("tiny"))
    (version / "tiny.nemo").write_text("another")
    with pytest.raises(JobError, match=f"^{version}: modified since it was written"):
        begin_execution(_job(store), store.flare("quick"), "simulator")


def test_journal_that_is_damaged_is_named_by_the_supervisor(store: Store) -> None:
    folder, workspace = current(store.job_folder("quick")), store.flare("quick")
    begin_execution(read_job_folder(folder), workspace, "simulator")
    journal = Workspace(workspace).journal
    journal.write_text("spilt\n")
    with pytest.raises(JobError, match=f"^{journal}, line 1: expected .* found 'spilt'; remove the file") as error:
        list(run_job(folder, workspace, Path("testing.jsonl"), store.checkpoint("quick")))
    assert not error.value.retryable
    assert journal.read_text() == "spilt\n"


def test_unfinished_execution_is_taken_up_and_an_ended_one_is_not(store: Store) -> None:
    where = (_job(store), store.flare("quick"), "simulator")
    first = begin_execution(*where)
    assert begin_execution(*where) == first
    Workspace(store.flare("quick")).end()
    assert begin_execution(*where).id != first.id


@pytest.mark.parametrize("changed", ["job folder", "base model", "runtime"])
def test_unfinished_execution_of_something_else_is_not_taken_up(store: Store, changed: str) -> None:
    first = begin_execution(_job(store), store.flare("quick"), "simulator")
    if changed == "job folder":
        _build(store, rounds=2)
    elif changed == "base model":
        _make_base_model(store, "another base model")
        _build(store)
    runtime = "poc" if changed == "runtime" else "simulator"
    assert begin_execution(_job(store), store.flare("quick"), runtime).id != first.id


def test_rebuilt_job_folder_with_the_same_content_is_the_same_job(store: Store) -> None:
    first = begin_execution(_job(store), store.flare("quick"), "simulator")
    _build(store)
    assert begin_execution(_job(store), store.flare("quick"), "simulator") == first
