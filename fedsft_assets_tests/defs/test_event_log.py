"""What the package logs in a step: each line once in the event log of the Dagster run, and once on a terminal."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from fedsft_assets.cli.log import shown_log
from fedsft_assets.cli.study import prepare_instance
from fedsft_assets.defs.assets.base_model import base_model_asset
from fedsft_assets.defs.resources import resources
from fedsft_assets.defs.run import execute
from fedsft_assets.process_env import home_environment
from fedsft_assets.settings import Settings

_TERMINAL = ["   reading x.nemo", "!  odd: 100% of it", "   from a thread"]
_LINES = [("reading x.nemo", logging.INFO), ("odd: 100% of it", logging.WARNING), ("from a thread", logging.INFO)]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Settings]:
    """Those of a home with the project's Dagster instance. A Dagster run sets the level of the package's loggers."""
    settings = Settings(home=tmp_path / "home")
    for name in home_environment(settings.home):
        monkeypatch.setenv(name, "as it was")  # so that it is put back afterwards
    prepare_instance(settings)
    package = logging.getLogger("fedsft_assets")
    level = package.level
    yield settings
    package.setLevel(level)


@dg.op
def _logs() -> None:
    """Logs as a module of the package does, in two threads."""
    log = logging.getLogger("fedsft_assets.model.base_model")
    log.debug("a detail")
    log.info("reading %s", "x.nemo")
    log.warning("odd: 100% of it")
    thread = threading.Thread(target=log.info, args=("from a thread",))
    thread.start()
    thread.join()


@dg.job(executor_def=dg.multiprocess_executor)
def _job() -> None:
    _logs()


def _job_of_this_module() -> dg.JobDefinition:
    """As step processes find it."""
    return _job


def _logged(instance: dg.DagsterInstance, run_id: str) -> list[dg.EventLogEntry]:
    records = instance.get_records_for_run(run_id).records
    return [record.event_log_entry for record in records if record.event_log_entry.dagster_event is None]


@pytest.mark.usefixtures("settings")
def test_step_has_each_line_once_in_the_event_log() -> None:
    with dg.DagsterInstance.get() as instance:
        result = _job.execute_in_process(instance=instance)
        logged = _logged(instance, result.run_id)
    assert [(entry.user_message, entry.level) for entry in logged] == _LINES
    assert {entry.step_key for entry in logged} == {"_logs"}


def test_asset_has_what_the_modules_that_make_it_log(settings: Settings, tmp_path: Path) -> None:
    from fedsft_assets.model.megatron.layout import LEGACY
    from fedsft_assets_tests.model.megatron_archives import SETTINGS, SHAPE, members, random_tensors, write_tar

    archive = write_tar(tmp_path / "gpt.nemo", members(SETTINGS, random_tensors(LEGACY)))
    with dg.DagsterInstance.get() as instance:
        offered = resources(settings.model_copy(update={"model": str(archive)}))
        result = dg.materialize([base_model_asset()], instance=instance, resources=offered)
        logged = _logged(instance, result.run_id)
    assert [entry.user_message for entry in logged] == [
        f"reading {archive}",
        f"{archive}: legacy layout, {SHAPE.parameters:,} parameters in float32",
    ]
    assert {(entry.step_key, entry.level) for entry in logged} == {("base_model", logging.INFO)}


def test_study_has_each_line_once_in_the_event_log_and_once_on_the_terminal(
    settings: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    with shown_log():
        run_id = execute(_job_of_this_module, {}, settings)
    with dg.DagsterInstance.get() as instance:
        logged = _logged(instance, run_id)
    assert [(entry.user_message, entry.level) for entry in logged] == _LINES
    shown = capfd.readouterr()
    assert [line.partition(" s  ")[2] for line in shown.out.splitlines()] == _TERMINAL
    assert shown.err == ""
