"""What a person sees of the package's log: all but details in a command, warnings elsewhere."""

import logging
import subprocess
import sys
from contextlib import suppress

import pytest

from fedsft_assets.cli.log import shown_log
from fedsft_assets.settings import PROJECT

_LOG = logging.getLogger("fedsft_assets.model.base_model")


def test_command_shows_progress_on_standard_output_and_warnings_on_standard_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with shown_log():
        _LOG.debug("a detail")
        _LOG.info("reading %s", "x.nemo")
        _LOG.warning("100% of it is odd")
        logging.getLogger("transformers").warning("somebody else's")
    assert capsys.readouterr() == ("reading x.nemo\n", "warning: 100% of it is odd\n")


def test_log_is_shown_until_the_command_ends(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        with suppress(SystemExit), shown_log():
            _LOG.info("reading x.nemo")
            sys.exit("it is damaged")
    _LOG.info("of no interest")
    assert capsys.readouterr() == ("reading x.nemo\nreading x.nemo\n", "")


def test_no_secret_is_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SOME_TOKEN", "planted-3141")
    with shown_log():
        _LOG.warning("https://me:%s@host does not answer", "planted-3141")
    assert capsys.readouterr().err == "warning: https://***@host does not answer\n"


_IN_A_NOTEBOOK = """
import logging
from fedsft_assets.model.progress import ByteProgress
ByteProgress(2 << 30, "written").add(1 << 30)
logging.getLogger("fedsft_assets.model.progress").warning("it is odd")
"""


def test_without_a_command_warnings_are_shown_as_python_does() -> None:
    command = [sys.executable, "-c", _IN_A_NOTEBOOK]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "it is odd\n")
