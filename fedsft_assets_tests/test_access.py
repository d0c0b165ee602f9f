"""What is written is its owner's alone whatever the umask; what was open is closed, and nothing else is touched."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fedsft_assets.access import OTHERS, close_to_others, is_open, said_of_kit
from fedsft_assets.files import publish_file, publish_folder
from fedsft_assets.settings import PROJECT
from fedsft_assets.versions import adding
from fedsft_assets_tests.watched import open_to_others

SOMEBODY = 4_000_000


def _open_tree(folder: Path) -> Path:
    """As a user has files that anybody may read."""
    (folder / "inner").mkdir(parents=True)
    (folder / "file").write_text("a file")
    (folder / "inner" / "script").write_text("#!/bin/sh")
    for path in (folder, folder / "inner", folder / "inner" / "script"):
        path.chmod(0o755)
    (folder / "file").chmod(0o644)
    return folder


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_whatever_a_process_writes_that_has_the_package_is_its_owners_alone(tmp_path: Path) -> None:
    """And what processes write that it starts, which have never heard of the package."""
    script = (
        "import subprocess, fedsft_assets; open('file', 'w'); import os; os.makedirs('a/b');"
        "subprocess.run(['sh', '-c', 'echo text > from-a-shell; mkdir made-there'], check=True)"
    )
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, umask=0, check=True)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "a", "from-a-shell", "made-there"}
    assert open_to_others(tmp_path) == []


def test_what_is_published_is_closed_whatever_was_copied(tmp_path: Path) -> None:
    source, home = _open_tree(tmp_path / "source"), tmp_path / "home"
    with publish_folder(home / "folder") as fresh:
        shutil.copytree(source, fresh, dirs_exist_ok=True)
    with publish_file(home / "file") as path:
        shutil.copy2(source / "file", path)
    with adding(home / "versions") as addition:
        shutil.copytree(source, addition.folder, dirs_exist_ok=True)
    assert (addition.version / "inner" / "script").is_file()
    assert open_to_others(home) == []
    assert _mode(home / "folder" / "inner" / "script") == 0o700
    assert _mode(source / "file") == 0o644


def test_what_is_open_is_closed_and_nothing_that_a_link_leads_to(tmp_path: Path) -> None:
    elsewhere, folder = _open_tree(tmp_path / "elsewhere"), _open_tree(tmp_path / "folder")
    (folder / "link").symlink_to(elsewhere)
    (folder / "file-link").symlink_to(elsewhere / "file")
    (folder / "dangling").symlink_to(tmp_path / "nowhere")
    assert is_open(folder)
    closed = close_to_others(folder)
    assert (closed.count, closed.keys, closed.refused) == (4, [], None)
    assert open_to_others(folder) == []
    assert not is_open(folder)
    assert (_mode(folder / "inner" / "script"), _mode(folder / "file")) == (0o700, 0o600)
    assert (_mode(elsewhere), _mode(elsewhere / "file")) == (0o755, 0o644)
    assert close_to_others(folder).count == 0
    assert close_to_others(tmp_path / "nowhere").count == 0


def test_folders_that_are_not_named_are_left_alone_in_what_the_user_may_have_for_other_things(tmp_path: Path) -> None:
    folder = _open_tree(tmp_path / "folder")
    theirs = _open_tree(folder / "theirs")
    assert close_to_others(folder, parts=["inner"]).count == 4
    assert open_to_others(folder) == open_to_others(theirs)
    assert len(open_to_others(theirs)) == 4


def test_keys_are_named_if_others_could_have_come_to_them(tmp_path: Path) -> None:
    kit = _open_tree(tmp_path / "kit")
    for name, mode in {"client.key": 0o644, "server.key": 0o600, "rootCA.pem": 0o644}.items():
        (kit / name).write_text("text")
        (kit / name).chmod(mode)
    (kit / "closed").mkdir(mode=0o700)
    (kit / "closed" / "cert.json").write_text("text")
    (kit / "closed" / "cert.json").chmod(0o644)
    closed = close_to_others(kit)
    assert closed.keys == [kit / "client.key"]
    assert open_to_others(kit) == []
    assert said_of_kit(kit, closed) == (
        f"{kit}: this startup kit was open to other accounts of this computer; access removed. Anyone who has read"
        " client.key can impersonate it: have it provisioned again"
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="files of another user need root")
def test_what_belongs_to_somebody_else_is_left_alone(tmp_path: Path) -> None:
    folder = _open_tree(tmp_path / "folder")
    theirs = _open_tree(folder / "theirs")
    for path in (theirs, theirs / "file"):
        os.chown(path, SOMEBODY, SOMEBODY)
    assert close_to_others(folder).count == 4
    assert (_mode(theirs), _mode(theirs / "file")) == (0o755, 0o644)
    assert not is_open(theirs)


def test_what_cannot_be_closed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk that knows no permissions."""
    folder = _open_tree(tmp_path / "folder")

    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refused)
    closed = close_to_others(folder)
    assert (closed.count, closed.refused) == (0, f"{folder}: Operation not permitted")


def test_others_are_group_and_world() -> None:
    assert OTHERS == 0o077
