"""Lines of logs: those of trainers as NVFlare passes them on, and NVFlare's own about a trainer that died."""

import copy
import io
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.utils.fl_context_utils import generate_log_message
from nvflare.app_common.executors.client_api.external_process_backend import ExternalProcessBackend, _TrainerSession
from nvflare.fuel.utils.log_utils import ColorFormatter, ConciseLogFilter, LogMode, logmode_config_dict
from nvflare.utils.process_utils import log_subprocess_output

from fedsft_assets.federation.site.failure_log import FAILURE_MARK, TrainerFailure, first_failure, read_line


@pytest.fixture(params=[LogMode.CONCISE, LogMode.FULL])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def nvflare_log(mode: str) -> Iterator[tuple[logging.Logger, io.StringIO]]:
    """A logger of NVFlare's, with the filters and the format that this mode gives the console."""
    config = copy.deepcopy(logmode_config_dict[mode])
    console = io.StringIO()
    handler = logging.StreamHandler(console)
    handler.setFormatter(ColorFormatter(config["formatters"]["consoleFormatter"]["fmt"]))
    for name in config["handlers"]["consoleHandler"]["filters"]:
        assert name == "ConciseFilter"
        handler.addFilter(ConciseLogFilter(config["filters"][name]["logger_names"]))
    logger = logging.Logger("nvflare.app_common.executors.client_api_executor.ClientAPIExecutor", logging.INFO)
    logger.addHandler(handler)
    yield logger, console
    logger.removeHandler(handler)


def _trainer(script: str) -> "subprocess.Popen[bytes]":
    """A process started as NVFlare starts a trainer."""
    return subprocess.Popen(
        [sys.executable, "-u", "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _line_about_the_end_of(
    process: "subprocess.Popen[bytes]", nvflare_log: tuple[logging.Logger, io.StringIO], mode: str
) -> str:
    """What NVFlare writes when it finds that this trainer has ended while it waits for a result."""
    logger, console = nvflare_log
    process.wait()
    session = _TrainerSession(token="", trainer_fqcn="site-2.job.trainer")
    session.process, session.pgid = process, process.pid
    # The check for a silent trainer, which comes after the one for a dead one, needs a whole context.
    error = ExternalProcessBackend._trainer_liveness_error(ExternalProcessBackend(), session)
    assert error is not None
    context = FLContext()
    context.set_prop(ReservedKey.IDENTITY_NAME, "site-2", private=True, sticky=False)
    logger.error(generate_log_message(context, f"{error} before task 'train' produced a result"))
    (line,) = console.getvalue().splitlines()
    assert ("identity=site-2" in line) == (mode == LogMode.FULL)
    return line


def test_trainer_that_was_killed_is_seen_in_the_line_that_nvflare_writes(
    nvflare_log: tuple[logging.Logger, io.StringIO], mode: str
) -> None:
    process = _trainer("import time; time.sleep(600)")
    os.kill(process.pid, signal.SIGKILL)
    said = read_line(_line_about_the_end_of(process, nvflare_log, mode))
    assert isinstance(said, TrainerFailure)
    assert said.reason == (
        "the trainer process was killed by signal 9 (SIGKILL); the usual cause is running out of memory"
    )
    assert not said.has_traceback


def test_trainer_that_ended_by_itself_is_seen_with_its_exit_code(
    nvflare_log: tuple[logging.Logger, io.StringIO], mode: str
) -> None:
    said = read_line(_line_about_the_end_of(_trainer("raise SystemExit(3)"), nvflare_log, mode))
    assert isinstance(said, TrainerFailure)
    assert said.reason == "the trainer process ended with exit code 3"


def _passed_on(script: str, nvflare_log: tuple[logging.Logger, io.StringIO]) -> list[str]:
    """What becomes of a trainer's output in NVFlare's log."""
    logger, console = nvflare_log
    with _trainer(script) as process:
        log_subprocess_output(process, logger)
    return console.getvalue().splitlines()


def test_traceback_of_a_trainer_comes_through_nvflares_log_as_it_was(
    nvflare_log: tuple[logging.Logger, io.StringIO],
) -> None:
    traceback = 'Traceback (most recent call last):\n  File "a.py"\nOSError: [Errno 2]: no "é"\r\n\t\\end'
    line = FAILURE_MARK + json.dumps(traceback)
    loading, passed_on = _passed_on(f"print('loading'); print({line!r})", nvflare_log)
    assert read_line(loading) is None
    assert read_line(passed_on) == TrainerFailure(traceback, has_traceback=True)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (
            "RuntimeError: trainer process group exited (rc=-6) before completing the HELLO handshake",
            "the trainer process was killed by signal 6 (SIGABRT)",
        ),
        (
            "2026-01-01 - ERROR - trainer process exited while TASK_READY was pending for task 'train'",
            "the trainer process ended",
        ),
        (
            "[0]: failed (exitcode: -9) local_rank: 1 (pid: 4711) of binary: python3",
            "the trainer process was killed by signal 9 (SIGKILL); the usual cause is running out of memory",
        ),
        ("trainer process exited (rc=-99) before", "the trainer process was killed by signal 99 (unknown)"),
        (
            "2026-01-01 - WARNING - notifying 1 receiver(s) that accepted result source site-1 failed for task t: "
            "accepted external result source died before transfer completion (rc=-15)",
            "the trainer process was killed by signal 15 (SIGTERM)",
        ),
    ],
)
def test_other_lines_about_dead_trainers_are_seen(line: str, reason: str) -> None:
    assert read_line(line) == TrainerFailure(reason, has_traceback=False)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "2026-01-01 - INFO - waiting for result from external trainer",
        "2026-01-01 - INFO - terminating trainer process group (pgid=12550, grace=5.0s)",
        "accepted external result source died before transfer completion (rc=0)",
        "Finished one task run for client: site-1 interval: 2 task_processed: True",
    ],
)
def test_lines_of_a_job_that_goes_well_say_nothing(line: str) -> None:
    assert read_line(line) is None


def test_first_failure_of_a_log_is_the_one_to_tell() -> None:
    said = FAILURE_MARK + json.dumps("Traceback: out of data")
    died = "RuntimeError: trainer process group exited (rc=1) before completing the HELLO handshake"
    log = "\n".join(["loading", f"2026-01-01 - INFO - {said}", died])
    assert first_failure(log) == TrainerFailure("Traceback: out of data", has_traceback=True)
    assert first_failure("\n".join([died, said])) == TrainerFailure(
        "the trainer process ended with exit code 1", has_traceback=False
    )


@pytest.mark.parametrize("log", ["", "loading\nFinished one task run for client: site-1\n"])
def test_log_without_a_failure_has_none(log: str) -> None:
    assert first_failure(log) is None
