"""Recognizes secrets, and keeps them out of URLs, errors and progress messages."""

import base64
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import quote, quote_plus, unquote

_SECRET_NAME = re.compile(
    r"PASSWORD|PASSWD|PASSPHRASE|SECRET|CREDENTIAL"
    r"|(^|_)([A-Z]*TOKENS?|[A-Z]*KEYS?|PASS|PWD?|PW|CREDS?|PAT|AUTH|SIGNATURE|COOKIES?|DSN)(_|$)",
    re.IGNORECASE,
)
PASS = "FEDSFT_PASS_ENVIRONMENT"
"""Comma-separated names of variables that are also passed to processes that may not have secrets."""

_NO_SECRETS = (PASS, "PWD", "FEDSFT_UI_TOKEN_FILE")  # despite their names
# User info of a URL: up to the last @ of a valid URL, or as SQLAlchemy parses a password with characters that should
# have been encoded. A port does not count.
_USER = r"[^/?#\s'\"<>]*|[^:/@\s'\"<>]*:(?!\d+(?:[/?#]|$))[^@\s'\"<>]*"
_URL_USER = re.compile(rf"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)(?P<user>{_USER})@")
_QUERY = re.compile(
    r"(?P<name>[?&;][^=&;#\s'\"]*(?:password|passwd|pwd|passphrase|token|secret|credential|signature|key|auth|sig)"
    r"[^=&;#\s'\"]*=)(?P<value>[^&;#\s'\"<>]+)",
    re.IGNORECASE,
)
_SHORTEST = 4  # shorter values would match everywhere
_HIDDEN = "***"


def is_secret_name(name: str) -> bool:
    """Whether a variable's name suggests a secret: `HF_TOKEN`, `AWS_SECRET_ACCESS_KEY`."""
    return name not in _NO_SECRETS and bool(_SECRET_NAME.search(name))


def is_secret(name: str, value: str) -> bool:
    """Whether a variable holds a secret, judging by its name and value."""
    return name not in _NO_SECRETS and (is_secret_name(name) or has_credentials(_as_url(name, value)))


def credentials_in(url: str) -> tuple[str, str] | None:
    """The user and password in a URL, decoded; None if it has none."""
    found = _URL_USER.match(url)
    if not found:
        return None
    user, _, password = found["user"].partition(":")
    return unquote(user), unquote(password)


def has_credentials(text: str) -> bool:
    """Whether the text contains a URL with credentials."""
    return "://" in text and bool(_URL_USER.search(text) or _QUERY.search(text))


def without_credentials(url: str) -> str:
    """The URL without user, password, and query parameters whose names suggest secrets."""
    public = _URL_USER.sub(lambda found: found["scheme"], url)
    head, mark, query = public.partition("?")
    if not mark:
        return public
    kept = [part for part in re.split(r"[&;]", query) if not _QUERY.match(f"?{part}")]
    return f"{head}?{'&'.join(kept)}" if kept else head


def redact(text: str) -> str:
    """Replace secrets in the text: those in this process's environment, and credentials in URLs."""
    for secret in sorted(set(_secrets()), key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    text = _URL_USER.sub(lambda found: f"{found['scheme']}{_HIDDEN}@", text)
    return _QUERY.sub(lambda found: f"{found['name']}{_HIDDEN}", text)


def redact_error(error: BaseException) -> None:
    """Redact the messages of an error and of its causes, in place."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        with suppress(Exception):  # some errors are immutable
            one.args = tuple(redact(arg) if isinstance(arg, str) else arg for arg in one.args)
        for name, value in [*vars(one).items(), ("filename", getattr(one, "filename", None))]:
            if isinstance(value, str) and (redacted_value := redact(value)) != value:
                with suppress(Exception):
                    setattr(one, name, redacted_value)
        waiting += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]


@contextmanager
def redacted() -> Iterator[None]:
    """Redact secrets from errors that leave the block or decorated function."""
    try:
        yield
    except Exception as error:
        redact_error(error)
        raise


def _secrets() -> Iterator[str]:
    """Every secret in this process's environment, in all encodings in which a message may contain it."""
    for name, value in os.environ.items():
        if is_secret_name(name):
            yield from _written(value)
        elif found := credentials_in(_as_url(name, value)):
            user, password = found
            yield from _written(password or user)
            yield from _written(base64.b64encode(f"{user}:{password}".encode()).decode())


def _as_url(name: str, value: str) -> str:
    """The value as a URL; for a proxy, `me:password@host:3128` counts too."""
    return f"http://{value}" if name.lower().endswith("_proxy") and "://" not in value else value


def _written(secret: str) -> Iterator[str]:
    if len(secret) >= _SHORTEST:
        yield from (secret, unquote(secret), quote(secret), quote(secret, safe=""), quote_plus(secret))


URI = "MLFLOW_TRACKING_URI"
_MLFLOW_USER, _MLFLOW_PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"

_as_given: dict[str, str] = {}


def take_credentials(uri: str) -> str:
    """The URI without its credentials, which this process keeps for MLflow.

    Credentials of a server are moved from MLFLOW_TRACKING_URI to MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD
    in this process's environment, where MLflow reads them. The full URI of a database is kept for `as_given`.
    """
    public = without_credentials(uri)
    if public == uri:
        return uri
    if not uri.startswith(("http://", "https://")):
        _as_given[public] = uri
        return public
    found = credentials_in(uri)
    if found and all(found):
        os.environ[_MLFLOW_USER], os.environ[_MLFLOW_PASSWORD] = found
    if os.environ.get(URI) == uri:
        os.environ[URI] = public
    return public


def as_given(uri: str) -> str:
    """The original URI given to `take_credentials` in this process, for MLflow."""
    return _as_given.get(uri, uri)
