"""The token of the user interfaces: made anew at every start, or as the operator of a proxy has written it down."""

import os
import re
import secrets
import stat
from pathlib import Path
from urllib.parse import urlsplit

from fedsft_assets.access import OTHERS

_TOKEN = re.compile(r"[A-Za-z0-9_-]{22,}")  # 22 characters of base64 are the first to hold 128 bits
_HOW = "write one with: (umask 077 && python3 -c 'import secrets; print(secrets.token_urlsafe(32))' > FILE)"


class TokenFileError(ValueError):
    """A file that no token is taken from; the message is one line, without the token."""


def new_token() -> str:
    """256 random bits, as they may stand in an address."""
    return secrets.token_urlsafe(32)


def read_token(path: Path) -> str:
    """The token in a file that only this account can read. Raises TokenFileError for any other."""
    try:
        with path.open(encoding="ascii") as file:
            found = os.fstat(file.fileno())
            text = file.read(4096).strip() if stat.S_ISREG(found.st_mode) else ""
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "has other characters than a token"
        raise TokenFileError(f"FEDSFT_UI_TOKEN_FILE: {path}: {said}; {_HOW}") from None
    if found.st_uid != os.geteuid() or found.st_mode & OTHERS:
        raise TokenFileError(
            f"FEDSFT_UI_TOKEN_FILE: {path}: belongs to uid {found.st_uid}, mode {stat.S_IMODE(found.st_mode):04o}, so"
            " others know this token or may; it has to be a file of this account's with mode 0600. Make another token:"
            f" {_HOW}"
        )
    if not _TOKEN.fullmatch(text):
        raise TokenFileError(
            f"FEDSFT_UI_TOKEN_FILE: {path}: has {len(text)} characters, and no token of 22 or more letters, digits,"
            f" '-' and '_'; {_HOW}"
        )
    return text


def link(url: str, token: str) -> str:
    """The address that opens a page for whoever has no cookie yet."""
    parts = urlsplit(url)
    query = f"{parts.query}&token={token}" if parts.query else f"token={token}"
    return parts._replace(query=query).geturl()
