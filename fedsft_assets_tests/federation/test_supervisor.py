"""What the supervisor makes of failures that a job's log shows; whole jobs are in the end-to-end tests."""

from pathlib import Path

from fedsft_assets.federation.supervisor import _explain
from fedsft_assets.federation.tail import Tail
from fedsft_assets.federation.trainer_log import TrainerFailure


def test_traceback_of_a_trainer_is_shown_as_it_is(tmp_path: Path) -> None:
    crashed = TrainerFailure("Traceback: out of data", said_why=True)
    told = _explain("site-2", crashed, Tail(tmp_path / "log.txt"))
    assert told == "the trainer of site-2 failed:\nTraceback: out of data"


def test_trainer_that_did_not_say_why_is_shown_with_the_end_of_its_sites_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("".join(f"line {k}\n" for k in range(100)) + "ModuleNotFoundError: No module named 'nemo'\n")
    exited = TrainerFailure("the trainer process ended with exit code 1", said_why=False)
    told = _explain("site-1", exited, Tail(log))
    assert told.startswith(
        f"the trainer of site-1 failed:\nthe trainer process ended with exit code 1\nThe end of {log}:\nline 61\n"
    )
    assert told.endswith("\nModuleNotFoundError: No module named 'nemo'")
