"""What `make` starts: the commands get every word as it was given, wherever the clone and the home are.

And by which Python an environment is made.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fedsft_assets.settings import PROJECT

SPECIAL = "a b'c\"d$HOME;e#f&g(h)*ü"
# In place of the virtual environment's Python: says what it was started with.
_PYTHON = """#!/bin/sh
for word in "$@"; do echo "word $word"; done
for name in FEDSFT_HOME XDG_CACHE_HOME MPLCONFIGDIR; do eval 'echo "$name=$'$name'"'; done
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone that is set up, as far as make can see."""
    folder = tmp_path / f"clone {SPECIAL}"
    (folder / ".venv/bin").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "requirements.txt"):
        shutil.copyfile(PROJECT / name, folder / name)
    python = folder / ".venv/bin/python"
    python.write_text(_PYTHON)
    python.chmod(0o700)
    (folder / ".venv/bin/uv").touch()
    (folder / ".venv/.ready").touch()
    return folder


@pytest.fixture
def make(clone: Path) -> Callable[..., list[str]]:
    def run(*arguments: str, **variables: str) -> list[str]:
        names = ("FEDSFT_", "MAKE", "DATA", "MODEL", "OVERRIDES", "UV_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(names)}
        done = subprocess.run(
            ["make", "--silent", *arguments],
            cwd=clone,
            env={**kept, **variables},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.splitlines()

    return run


def _words(lines: Sequence[str]) -> list[str]:
    return [line.removeprefix("word ") for line in lines if line.startswith("word ")]


@pytest.mark.parametrize("target", ["study", "ui"])
def test_nothing_is_said_for_a_person_who_says_nothing(make: Callable[..., list[str]], target: str) -> None:
    assert _words(make(target)) == ["-m", "fedsft_assets.cli", target]
    variables = {"FEDSFT_DATA": "hub", "FEDSFT_MODEL": "gpt-1.3b"}
    assert _words(make(target, **variables)) == ["-m", "fedsft_assets.cli", target]


@pytest.mark.parametrize("target", ["study", "ui"])
def test_data_and_model_are_passed_on_as_they_are(make: Callable[..., list[str]], target: str) -> None:
    said = ["-m", "fedsft_assets.cli", target, "--data", SPECIAL, "--model", "$x"]
    assert _words(make(target, DATA=SPECIAL, MODEL="$x")) == said
    assert _words(make(target, f"DATA={SPECIAL.replace('$', '$$')}", "MODEL=$$x")) == said


def test_the_demo_is_always_the_same(make: Callable[..., list[str]]) -> None:
    words = ["-m", "fedsft_assets.cli", "study", "--data", "sample", "--model", "tiny"]
    assert _words(make("demo", DATA="hub", MODEL="gpt-1.3b")) == words


def test_overrides_are_words(make: Callable[..., list[str]]) -> None:
    assert _words(make("study", "OVERRIDES=--rounds 3"))[-2:] == ["--rounds", "3"]


def test_home_is_in_the_clone_or_where_it_is_said_to_be(
    make: Callable[..., list[str]], clone: Path, tmp_path: Path
) -> None:
    home = f"{tmp_path}/home {SPECIAL}"
    for lines, expected in ((make("ui"), f"{clone}/.fedsft"), (make("ui", FEDSFT_HOME=home), home)):
        assert f"FEDSFT_HOME={expected}" in lines
        assert f"XDG_CACHE_HOME={expected}/cache" in lines
        assert f"MPLCONFIGDIR={expected}/cache/matplotlib" in lines


def test_tests_write_into_the_home(make: Callable[..., list[str]], tmp_path: Path) -> None:
    home = f"{tmp_path}/home {SPECIAL}"
    words = _words(make("test", FEDSFT_HOME=home))
    assert words[words.index("--basetemp") + 1] == f"{home}/pytest"
    assert Path(home).is_dir()


def test_uv_looks_for_packages_where_pip_does_unless_it_is_told_otherwise(
    make: Callable[..., list[str]], clone: Path
) -> None:
    python, uv = (clone / ".venv/bin" / name for name in ("python", "uv"))
    python.write_text("""#!/bin/sh
echo ":env:.find-links='/wheels /more'"; echo "global.find-links='/others'"; echo "global.index-url='https://pip'"
""")
    uv.write_text('#!/bin/sh\necho "$UV_FIND_LINKS" "$UV_DEFAULT_INDEX"\n')
    uv.chmod(0o700)
    for said, expected in (({}, "/wheels,/more https://pip"), ({"UV_FIND_LINKS": "", "UV_DEFAULT_INDEX": "u"}, " u")):
        (clone / ".venv/.ready").unlink()
        assert expected in make("setup", **said)


def test_what_an_interrupted_installation_wrote_is_written_again_and_not_downloaded_again(
    make: Callable[..., list[str]], clone: Path
) -> None:
    downloaded, half = clone / ".venv/.cache/wheel", clone / ".venv/lib/python3.11/site-packages/half"
    for path in (downloaded, half):
        path.parent.mkdir(parents=True)
        path.touch()
    uv = clone / ".venv/bin/uv"
    uv.write_text(f"#!/bin/sh\nls -A {half.parent.relative_to(clone)} $UV_CACHE_DIR\n")
    uv.chmod(0o700)
    (clone / ".venv/.ready").unlink()
    lines = make("setup")
    assert "wheel" in lines
    assert "half" not in lines
    assert not downloaded.parent.exists()


@pytest.fixture
def set_up(clone: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`make setup` of a clone that has no environment, where the named Pythons are the only ones that will do."""
    shutil.rmtree(clone / ".venv")

    def run(*arguments: str, suitable: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        programs = tmp_path / "programs"
        programs.mkdir()
        for name in ("python3", "python3.11", "python3.12", "python3.13"):
            (programs / name).write_text(f"#!/bin/sh\nexit {int(name not in suitable)}\n")
            (programs / name).chmod(0o700)
        return subprocess.run(
            ["make", "setup", *arguments],
            cwd=clone,
            env={"PATH": f"{programs}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_the_first_python_that_will_do_makes_the_environment(
    set_up: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = set_up("--dry-run", suitable=["python3.12", "python3"])
    assert '"python3.12" -m venv' in done.stdout


@pytest.mark.parametrize(
    ("said", "found"), [([], "there is none on PATH"), (["PYTHON=python3.12"], "python3.12 is none")]
)
def test_without_a_python_that_will_do_it_says_which_would(
    set_up: Callable[..., subprocess.CompletedProcess[str]], clone: Path, said: list[str], found: str
) -> None:
    done = set_up(*said)
    assert done.returncode != 0
    assert "Python 3.11, 3.12 or 3.13" in done.stderr
    assert found in done.stderr
    assert "make setup PYTHON=/path/to/python3.12" in done.stderr
    assert not (clone / ".venv").exists()
