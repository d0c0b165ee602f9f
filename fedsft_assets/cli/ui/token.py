"""The token of the web interfaces: generated at every start, or read from a file for use behind a proxy."""

import os
import re
import secrets
import stat
from pathlib import Path
from urllib.parse import urlsplit

from fedsft_assets.access import OTHERS

_TOKEN = re.compile(r"[A-Za-z0-9_-]{22,}")  # 22 base64 characters hold 128 bits
_HOW = "write one with: (umask 077 && python3 -c 'import secrets; print(secrets.token_urlsafe(32))' > FILE)"


class TokenFileError(ValueError):
    """The token file cannot be used; the message is one line, without the token."""


def new_token() -> str:
    """256 random bits, URL-safe."""
    return secrets.token_urlsafe(32)


def read_token(path: Path) -> str:
    """Read the token from a file that only this account can access. Raises TokenFileError for any other file."""
    try:
        with path.open(encoding="ascii") as file:
            found = os.fstat(file.fileno())
            text = file.read(4096).strip() if stat.S_ISREG(found.st_mode) else ""
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "contains characters that a token cannot have"
        raise TokenFileError(f"FEDSFT_UI_TOKEN_FILE: {path}: {reason}; {_HOW}") from None
    if found.st_uid != os.geteuid() or found.st_mode & OTHERS:
        raise TokenFileError(
            f"FEDSFT_UI_TOKEN_FILE: {path}: belongs to uid {found.st_uid}, mode {stat.S_IMODE(found.st_mode):04o}, so"
            " others may know this token; expected a file of this account with mode 0600. Create a new token:"
            f" {_HOW}"
        )
    if not _TOKEN.fullmatch(text):
        raise TokenFileError(
            f"FEDSFT_UI_TOKEN_FILE: {path}: expected a token of 22 or more letters, digits, '-' and '_', found"
            f" {len(text)} characters; {_HOW}"
        )
    return text


def link(url: str, token: str) -> str:
    """The URL with the token, for a browser without a cookie."""
    parts = urlsplit(url)
    query = f"{parts.query}&token={token}" if parts.query else f"token={token}"
    return parts._replace(query=query).geturl()
