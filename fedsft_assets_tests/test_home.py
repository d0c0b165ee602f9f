"""What a home remembers: every process over it works on the same, and another study gets a home of its own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest

from fedsft_assets.home import check_home, claim_home, close_home
from fedsft_assets.home_file import HOME_FILE, HomeError
from fedsft_assets.settings import PROJECT, Settings
from fedsft_assets_tests.watched import open_to_others


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DATA", "MODEL", "MODEL_PATH", "DATASETS", "JOBS", "HOME", "SEEDS"):
        monkeypatch.delenv(f"FEDSFT_{name}", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], str]:
    def make(name: str) -> str:
        (tmp_path / name).mkdir(parents=True)
        return str(tmp_path / name)

    return make


def _never(old: Path) -> None:
    raise AssertionError(f"the home was not moved from {old}")


def _claim(settings: Settings, move: Callable[[Path], object] = _never) -> None:
    """As a process does that ends at once, and its lock with it."""
    locks: list[IO[str]] = []
    try:
        claim_home(settings, move, locks)
    finally:
        for lock in locks:
            lock.close()


def _use(path: Path, **said: str) -> None:
    """A study over the home, which makes something."""
    _claim(Settings(home=path, **said))
    (path / "raw").mkdir(exist_ok=True)


def _refusal(act: Callable[[], object]) -> str:
    with pytest.raises(HomeError) as refused:
        act()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_is_not_said_comes_from_the_home(tmp_path: Path, folder: Callable[[str], str]) -> None:
    said = {"data": folder("data"), "model": folder("model"), "jobs": folder("jobs"), "datasets": folder("datasets")}
    _use(tmp_path / "home", **said)
    remembered = Settings(home=tmp_path / "home")
    assert remembered.purpose == said
    check_home(remembered)
    _claim(remembered)


def test_home_remembers_the_seeds_and_takes_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("FEDSFT_SEEDS", "3")
    _use(home)
    monkeypatch.delenv("FEDSFT_SEEDS")
    assert Settings(home=home).seeds == [1234, 1235, 1236]
    monkeypatch.setenv("FEDSFT_SEEDS", "1")
    _use(home)
    monkeypatch.delenv("FEDSFT_SEEDS")
    assert Settings(home=home).seeds == []


def test_the_environment_says_so_too_and_the_home_is_below_it(
    tmp_path: Path, folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _use(tmp_path / "home", data=folder("data"))
    monkeypatch.setenv("FEDSFT_HOME", str(tmp_path / "home"))
    assert Settings().source == str(tmp_path / "data")
    monkeypatch.setenv("FEDSFT_DATA", "")
    assert Settings().source == str(tmp_path / "data")
    monkeypatch.setenv("FEDSFT_DATA", "sample")
    assert Settings().source == "sample"
    assert "not for data sample" in _refusal(lambda: check_home(Settings()))


def test_same_folder_said_in_another_way_is_the_same(
    tmp_path: Path, folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _use(tmp_path / "home", data=folder("data"), model=folder("model"))
    monkeypatch.chdir(tmp_path)
    _claim(Settings(home=tmp_path / "home", data="data", model="./model/"))


@pytest.mark.parametrize("field", ["data", "model", "jobs", "datasets"])
def test_another_value_gets_the_command_for_another_home(
    tmp_path: Path, folder: Callable[[str], str], field: str
) -> None:
    path, other = tmp_path / "home", folder("other one")
    _use(path)
    before = (path / HOME_FILE).read_bytes()
    for refuse in (check_home, _claim):
        said = _refusal(lambda refuse=refuse: refuse(Settings(home=path, **{field: other})))  # type: ignore[misc]
        assert said.startswith(f"{path / HOME_FILE}: this home is for data sample, model tiny")
        option = f"fedsft study --{field} '{other}'"
        variable = f"FEDSFT_{field.upper()}='{other}' fedsft study"
        command = option if field in ("data", "model") else variable
        assert said.endswith(f"use another home for that: FEDSFT_HOME={path}-2 {command}")
    assert (path / HOME_FILE).read_bytes() == before


def test_the_command_repeats_what_else_is_unusual(tmp_path: Path, folder: Callable[[str], str]) -> None:
    _use(tmp_path / "home", data=folder("mine"), jobs=folder("jobs"))
    (tmp_path / "home-2").mkdir()
    said = _refusal(lambda: _claim(Settings(home=tmp_path / "home", model="gpt-1.3b")))
    assert said.endswith(
        f"FEDSFT_HOME={tmp_path}/home-3 FEDSFT_JOBS={tmp_path}/jobs fedsft study --data {tmp_path}/mine"
        " --model gpt-1.3b"
    )


def test_home_without_anything_in_it_may_become_another(tmp_path: Path, folder: Callable[[str], str]) -> None:
    path = tmp_path / "home"
    _claim(Settings(home=path))
    _claim(Settings(home=path, data=folder("data")))
    assert Settings(home=path).source == str(tmp_path / "data")


def test_home_that_another_process_uses_stays_what_it_is(tmp_path: Path, folder: Callable[[str], str]) -> None:
    path = tmp_path / "home"
    claiming = (
        "import sys; from pathlib import Path; from fedsft_assets.home import claim_home;"
        "from fedsft_assets.settings import Settings;"
        "claim_home(Settings(home=Path(sys.argv[1])), print); print('claimed', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", claiming, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=PROJECT,
    ) as user:
        assert user.stdout
        assert user.stdout.readline() == "claimed\n"
        data = folder("data")
        assert "not for data" in _refusal(lambda: _claim(Settings(home=path, data=data)))
        _claim(Settings(home=path))  # the same is welcome
        assert user.stdin
        user.stdin.close()
    _claim(Settings(home=path, data=data))


@pytest.mark.parametrize("place", ["file", "file/home"])
def test_home_that_cannot_be_a_folder_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HomeError, match=r": cannot create this folder: .*; set FEDSFT_HOME to another one"):
        _claim(Settings(home=tmp_path / place), print)


def test_data_that_is_not_there_leaves_no_trace(tmp_path: Path) -> None:
    said = _refusal(lambda: _claim(Settings(home=tmp_path / "home", data=str(tmp_path / "nowhere"))))
    assert said == f"FEDSFT_DATA: '{tmp_path}/nowhere' is neither 'sample' nor 'hub' nor a folder"
    assert not (tmp_path / "home" / HOME_FILE).exists()


def test_folder_that_is_gone_is_asked_for_and_its_new_place_accepted(
    tmp_path: Path, folder: Callable[[str], str]
) -> None:
    path = tmp_path / "home"
    _use(path, data=folder("data"), jobs=folder("jobs"))
    (tmp_path / "data").rename(tmp_path / "moved")
    said = _refusal(lambda: _claim(Settings(home=path)))
    assert said == (
        f"{path / HOME_FILE}: {tmp_path}/data, the data of this home, does not exist any more; give its new path once:"
        " fedsft study --data <data>"
    )
    assert said == _refusal(lambda: check_home(Settings(home=path)))
    assert "not for data sample" in _refusal(lambda: _claim(Settings(home=path, data="sample")))
    _claim(Settings(home=path, data=str(tmp_path / "moved")))
    assert Settings(home=path).source == str(tmp_path / "moved")
    (tmp_path / "jobs").rename(tmp_path / "other jobs")
    assert _refusal(lambda: _claim(Settings(home=path))).endswith("FEDSFT_JOBS=<folder of jobs> fedsft study")


def test_own_folders_are_remembered_as_such(tmp_path: Path) -> None:
    path = tmp_path / "home"
    (path / "data").mkdir(parents=True)
    _claim(Settings(home=path, data=str(path / "data"), jobs=PROJECT / "jobs/examples"))
    assert json.loads((path / HOME_FILE).read_text()) == {
        "place": str(path),
        "data": "<home>/data",
        "model": "tiny",
        "datasets": "<project>/datasets",
        "jobs": "<project>/jobs/examples",
    }
    path.rename(tmp_path / "moved")
    assert Settings(home=tmp_path / "moved").source == str(tmp_path / "moved/data")


def test_home_that_was_moved_is_told_its_old_place_once(tmp_path: Path) -> None:
    _use(tmp_path / "home")
    (tmp_path / "home").rename(tmp_path / "moved")
    told: list[Path] = []
    for _ in range(2):
        _claim(Settings(home=tmp_path / "moved"), told.append)
    assert told == [tmp_path / "home"]


def test_move_that_failed_is_told_again(tmp_path: Path) -> None:
    _use(tmp_path / "home")
    (tmp_path / "home").rename(tmp_path / "moved")
    with pytest.raises(AssertionError):
        _claim(Settings(home=tmp_path / "moved"))
    told: list[Path] = []
    _claim(Settings(home=tmp_path / "moved"), told.append)
    assert told == [tmp_path / "home"]


def test_where_the_models_archive_lies_may_change(tmp_path: Path, folder: Callable[[str], str]) -> None:
    path = tmp_path / "home"
    _use(path, model="gpt-1.3b", model_path=folder("archive"))
    assert Settings(home=path).model_path == tmp_path / "archive"
    _claim(Settings(home=path, model_path=folder("elsewhere")))
    assert Settings(home=path).model_path == tmp_path / "elsewhere"


@pytest.mark.parametrize("content", ["", "[]", '{"place": 7}', '{"place": "/x", "data": ["sample"]}', "\x00"])
def test_file_that_is_something_else_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / HOME_FILE).write_text(content)
    assert _refusal(lambda: Settings(home=tmp_path)).startswith(
        f"{tmp_path / HOME_FILE}: not a valid record of what this"
    )


def _open(home: Path) -> None:
    """As an earlier version has made it, where a umask lets everybody read."""
    for path in [home, *home.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def _kits(home: Path) -> None:
    """What lies in a home of the keys of its POC."""
    for name in ("provision/fedsft/state/cert.json", "kits/localhost/startup/server.key", "kits/site-1/readme.txt"):
        (home / "poc" / name).parent.mkdir(parents=True, exist_ok=True)
        (home / "poc" / name).write_text("a key")


def test_new_home_is_its_owners_alone_and_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    new, there = tmp_path / "new", tmp_path / "there"
    there.mkdir()
    there.chmod(0o777)
    before = os.umask(0)
    try:
        for path in (new, there):
            _claim(Settings(home=path))
    finally:
        os.umask(before)
    assert (new.stat().st_mode & 0o777, there.stat().st_mode & 0o777) == (0o700, 0o700)
    assert caplog.messages == []


def test_home_of_an_earlier_version_is_closed_when_it_is_used_and_its_user_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "home"
    _use(path)
    (path / "raw" / "rows.jsonl").write_text("{}")
    _open(path)
    own = path / "my own folder"
    own.mkdir(mode=0o755)
    own.chmod(0o755)
    _claim(Settings(home=path))
    said = f"{path}: 5 files and folders were open to other accounts of this computer; access removed"
    assert caplog.messages == [said]
    assert open_to_others(path) == [own]
    _claim(Settings(home=path))
    check_home(Settings(home=path))
    assert caplog.messages == [said]
    _open(path)
    check_home(Settings(home=path))  # as the code location does, whoever has started it
    assert caplog.messages == [said, said]


def test_who_could_have_read_the_keys_of_a_poc_is_told_how_they_are_renewed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a home"
    _use(path)
    _kits(path)
    _open(path)
    close_home(path)
    (said,) = caplog.messages
    assert said.endswith(
        " access removed. Anyone who has read the POC's private keys can still act as its administrator; renew its"
        f" certificates: FEDSFT_HOME='{path}' fedsft poc renew"
    )
    assert "\n" not in said
    assert open_to_others(path) == []
    close_home(path)
    assert caplog.messages == [said]


def test_keys_behind_a_closed_folder_need_not_be_renewed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "home"
    _use(path)
    _kits(path)
    _open(path)
    path.chmod(0o700)
    close_home(path)
    (said,) = caplog.messages
    assert "renew" not in said
    assert open_to_others(path) == []


def test_home_that_cannot_be_closed_is_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "home"
    _use(path)
    path.chmod(0o755)

    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refused)
    close_home(path)
    assert caplog.messages == [
        f"{path}: other accounts of this computer can read it, and its permissions cannot be changed ({path}: Operation"
        " not permitted); set FEDSFT_HOME to a folder on a file system with permissions"
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_another_account_can_enter_no_home() -> None:
    """In a place that everybody may enter, as people have them."""
    with tempfile.TemporaryDirectory(prefix="fedsft-") as place:
        Path(place).chmod(0o755)
        path = Path(place) / "home"
        _use(path)
        _open(path)
        as_another = ["setpriv", "--reuid=4000000", "--regid=4000000", "--clear-groups", "cat", str(path / HOME_FILE)]
        assert subprocess.run(as_another, capture_output=True, check=False).returncode == 0
        _claim(Settings(home=path))
        assert subprocess.run(as_another, capture_output=True, check=False).returncode != 0
