"""Temporary links for folders whose paths contain special characters."""

import os
import shlex
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fedsft_assets.federation.runtimes.plain_path import is_plain, plain_path
from fedsft_assets.settings import PROJECT

SPECIAL = [character for character in map(chr, range(32, 127)) if not is_plain(Path(f"/a{character}b"))]


@pytest.fixture(autouse=True)
def temporary(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The place for temporary files, with nothing else in it."""
    with tempfile.TemporaryDirectory(prefix="fedsft-test-") as folder:
        monkeypatch.setattr("tempfile.tempdir", folder)
        yield Path(folder)  # type: ignore[misc]


def test_plain_path_is_used_as_it_is(temporary: Path) -> None:
    with plain_path(Path("/a/b-c_1.2@x=y")) as path:
        assert path == Path("/a/b-c_1.2@x=y")
        assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("character", [*SPECIAL, "ü", "日", "\u00a0", "\t"])
def test_folder_with_a_special_path_has_a_temporary_link(temporary: Path, tmp_path: Path, character: str) -> None:
    folder = tmp_path / f"a{character}b"
    folder.mkdir()
    with plain_path(folder) as path:
        assert shlex.split(f"x {path} y") == ["x", str(path), "y"]
        assert os.pathsep not in str(path)
        (path / "file").write_text("content")
        assert (folder / "file").read_text() == "content"
        assert path.is_relative_to(temporary)
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert list(temporary.iterdir()) == []
    assert (folder / "file").exists()


def test_special_characters_are_known() -> None:
    assert set(SPECIAL) == set(" !\"#$&'()*:;<>?[\\]^`{|}~")


def test_two_links_to_one_folder_are_independent(tmp_path: Path) -> None:
    with plain_path(tmp_path / "a b") as first:
        with plain_path(tmp_path / "a b") as second:
            assert first != second
        assert first.is_symlink()


def test_link_of_a_process_that_was_killed_is_removed_by_the_next(temporary: Path, tmp_path: Path) -> None:
    linking = (
        "import sys; from pathlib import Path; from fedsft_assets.federation.runtimes.plain_path import plain_path;"
        "link = plain_path(Path(sys.argv[1])); print(link.__enter__(), flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", linking, str(tmp_path / "a b")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=PROJECT,
        env={**os.environ, "TMPDIR": str(temporary)},
    ) as process:
        assert process.stdout
        link = Path(process.stdout.readline().strip())
        with plain_path(tmp_path / "a b"):
            assert link.is_symlink()
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert link.is_symlink()
    with plain_path(tmp_path / "a b"):
        assert not link.is_symlink()


def test_temporary_folder_with_a_special_path_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my temporary files").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "my temporary files"))
    with plain_path(tmp_path / "a b") as path:
        assert is_plain(path)
    assert list((tmp_path / "my temporary files").iterdir()) == []
