"""The token of the user interfaces: long, new each time, or from a file that nobody else can read."""

import os
from pathlib import Path

import pytest

from fedsft_assets.cli.ui.token import TokenFileError, link, new_token, read_token
from fedsft_assets.settings import Settings

TOKEN = "0123456789-abcdefghij_XYZ"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o600)
    return path


def test_every_start_has_another_token_of_at_least_128_bits() -> None:
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100
    assert all(len(token) * 6 >= 128 for token in tokens)


def test_token_in_a_file_is_taken(file: Path) -> None:
    assert read_token(file) == TOKEN
    file.chmod(0o400)
    assert read_token(file) == TOKEN


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o644, 0o660, 0o666, 0o777])
def test_file_that_others_can_read_or_write_is_refused(file: Path, mode: int) -> None:
    file.chmod(mode)
    with pytest.raises(TokenFileError, match=f"FEDSFT_UI_TOKEN_FILE: {file}: .*mode 0{mode:o}.*mode 0600") as error:
        read_token(file)
    assert TOKEN not in str(error.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_file_of_another_account_is_refused(file: Path) -> None:
    os.chown(file, 65534, 65534)
    with pytest.raises(TokenFileError, match="belongs to uid 65534, mode 0600"):
        read_token(file)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "found 0 characters"),
        (b"0123456789", "found 10 characters"),
        (b"0123456789 0123456789 0123456789", "found 32 characters"),
        (b"0123456789+0123456789/0123456789", "found 32 characters"),
        (TOKEN.encode() + b"\n" + TOKEN.encode(), "found 51 characters"),
        ("0123456789äöü0123456789".encode(), "contains characters that a token cannot have"),
    ],
)
def test_file_without_a_token_is_refused(file: Path, content: bytes, found: str) -> None:
    file.write_bytes(content)
    with pytest.raises(TokenFileError, match=f"{found}.*token_urlsafe"):
        read_token(file)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TokenFileError, match="nothing: No such file or directory; write one with"):
        read_token(tmp_path / "nothing")
    with pytest.raises(TokenFileError, match="Is a directory"):
        read_token(tmp_path)


@pytest.mark.parametrize(
    ("url", "opened"),
    [
        ("http://127.0.0.1:3000/asset-groups/~all", "http://127.0.0.1:3000/asset-groups/~all?token=T"),
        ("http://127.0.0.1:5000/#/runs?mode=CHART", "http://127.0.0.1:5000/?token=T#/runs?mode=CHART"),
        ("http://127.0.0.1:6006/?darkMode=true", "http://127.0.0.1:6006/?darkMode=true&token=T"),
    ],
)
def test_link_has_the_token_where_the_server_gets_it(url: str, opened: str) -> None:
    assert link(url, "T") == opened


def test_the_file_is_a_setting(monkeypatch: pytest.MonkeyPatch, file: Path, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDSFT_HOME", str(tmp_path))
    assert Settings().ui_token_file is None
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDSFT_UI_TOKEN_FILE", "token")
    assert Settings().ui_token_file == file
