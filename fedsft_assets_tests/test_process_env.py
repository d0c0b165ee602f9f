"""What the processes of sites, trainers, a POC and user interfaces of others know of the user's environment."""

import ast
import os
from pathlib import Path

import pytest

from fedsft_assets.credentials import PASS
from fedsft_assets.process_env import child_environment, forget_secrets, home_environment
from fedsft_assets.settings import PROJECT, Settings
from fedsft_assets_tests.watched import PLANTED

NEEDED = {
    "PATH": "/usr/bin",
    "HOME": "/home/me",
    "LANG": "de_DE.UTF-8",
    "LC_ALL": "C",
    "TMPDIR": "/var/tmp",
    "PYTHONPATH": "/somewhere",
    "LD_LIBRARY_PATH": "/usr/lib/cuda",
    "CUDA_VISIBLE_DEVICES": "0,1",
    "NCCL_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "https_proxy": "http://proxy:3128",
    "FEDSFT_HOME": "/home/me/study",
    "FEDSFT_POC__GPUS": "0",
}


def test_a_child_knows_what_it_needs_and_no_secret_whatever_it_is_called() -> None:
    assert child_environment({**PLANTED, **NEEDED}) == NEEDED
    assert child_environment(PLANTED) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("https_proxy", "me:secret@proxy:3128"),
        ("ALL_PROXY", "socks5h://me:secret@proxy"),
        ("FEDSFT_PASS", "secret"),
        ("FEDSFT_DB_PW", "secret"),
        ("FEDSFT_STORE", "s3://key:secret@bucket"),
        ("NVFLARE_SOMETHING", "https://host/?api_key=secret"),
    ],
)
def test_no_secret_comes_with_what_is_passed_by_its_name(name: str, value: str) -> None:
    assert child_environment({name: value, "PATH": "/bin"}) == {"PATH": "/bin"}


def test_what_is_named_is_passed_on_and_to_children_of_children() -> None:
    named = {**PLANTED, PASS: "WHATEVER, PGPASSWORD,https_proxy"}
    once = child_environment(named)
    assert once == {name: named[name] for name in (PASS, "WHATEVER", "PGPASSWORD", "https_proxy")}
    assert child_environment(once) == once


def test_every_setting_is_known_to_a_child(tmp_path: Path) -> None:
    variables = {f"FEDSFT_{name.upper()}": "1" for name in Settings.model_fields if name != "mlflow_uri"}
    assert child_environment(variables) == variables
    own = home_environment(tmp_path)
    assert child_environment(own) == own


def test_a_process_forgets_what_its_children_may_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {**PLANTED, **NEEDED})
    forget_secrets()
    assert os.environ == NEEDED


def test_names_to_pass_on_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASS, "A_B, c1")
    assert Settings().pass_environment == "A_B, c1"
    monkeypatch.setenv(PASS, "A=1")
    with pytest.raises(ValueError, match="pass_environment"):
        Settings()


# Who starts processes that may know what their user knows: Dagster's web server, and torchrun, from a trainer.
WHOLE = {"cli/ui/start.py", "federation/site/ranks.py"}
# It becomes the Python that NVFlare has started, with the environment that NVFlare has.
STANDS_IN = {"federation/runtimes/simulator/forked_python.py"}
ALL_OF_IT = ("**(os.environ", "**os.environ", "dict(os.environ)", "os.environ.copy()", "os.environ |", "env=os.environ")


def test_nobody_else_starts_a_process_with_the_whole_environment() -> None:
    """A process without `env=` would have it, and so would one that is given `os.environ`."""
    found = set()
    package = PROJECT / "fedsft_assets"
    for path in sorted(package.rglob("*.py")):
        name, text = path.relative_to(package).as_posix(), path.read_text(encoding="utf-8")
        for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
            said = ast.unparse(call.func)
            starts = said in ("subprocess.Popen", "subprocess.run", "os.execv", "os.spawnv", "os.system", "os.popen")
            starts |= said.startswith("subprocess.check_") or said == "subprocess.call"
            if starts and not any(keyword.arg == "env" for keyword in call.keywords):
                found.add(name)
        if any(whole in text for whole in ALL_OF_IT):
            found.add(name)
    assert found == WHOLE | STANDS_IN
