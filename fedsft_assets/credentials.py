"""What is a secret, and how it is kept out of texts that somebody may read: URLs, errors, lines of progress."""

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
"""Holds names of variables, with commas between them, that processes get too which may know no secrets."""

_NO_SECRETS = (PASS, "PWD", "FEDSFT_UI_TOKEN_FILE")  # whatever their names look like
# In a URL, what comes before the host: up to its last @ if the rest is as it should be, and what SQLAlchemy makes of a
# password with characters that should have been encoded. A port is none.
_USER = r"[^/?#\s'\"<>]*|[^:/@\s'\"<>]*:(?!\d+(?:[/?#]|$))[^@\s'\"<>]*"
_URL_USER = re.compile(rf"(?P<scheme>\b[A-Za-z][A-Za-z0-9+.-]*://)(?P<user>{_USER})@")
_QUERY = re.compile(
    r"(?P<name>[?&;][^=&;#\s'\"]*(?:password|passwd|pwd|passphrase|token|secret|credential|signature|key|auth|sig)"
    r"[^=&;#\s'\"]*=)(?P<value>[^&;#\s'\"<>]+)",
    re.IGNORECASE,
)
_SHORTEST = 4  # a value that is shorter would be found everywhere
_HIDDEN = "***"


def is_secret_name(name: str) -> bool:
    """Whether a variable of this name holds a secret, as far as names say: `HF_TOKEN`, `AWS_SECRET_ACCESS_KEY`."""
    return name not in _NO_SECRETS and bool(_SECRET_NAME.search(name))


def is_secret(name: str, value: str) -> bool:
    """Whether a variable of this name and value holds one."""
    return name not in _NO_SECRETS and (is_secret_name(name) or has_credentials(_as_url(name, value)))


def credentials_in(url: str) -> tuple[str, str] | None:
    """The user and password in a URL, decoded; None if it has none."""
    found = _URL_USER.match(url)
    if not found:
        return None
    user, _, password = found["user"].partition(":")
    return unquote(user), unquote(password)


def has_credentials(text: str) -> bool:
    """Whether there is a URL in it that opens something by itself."""
    return "://" in text and bool(_URL_USER.search(text) or _QUERY.search(text))


def without_credentials(url: str) -> str:
    """The URL without user and password, and without values of its query that are secrets by their names."""
    public = _URL_USER.sub(lambda found: found["scheme"], url)
    head, mark, query = public.partition("?")
    if not mark:
        return public
    kept = [part for part in re.split(r"[&;]", query) if not _QUERY.match(f"?{part}")]
    return f"{head}?{'&'.join(kept)}" if kept else head


def redact(text: str) -> str:
    """The text without the secrets that this process has in its environment, and without what URLs say of others."""
    for secret in sorted(set(_secrets()), key=len, reverse=True):
        text = text.replace(secret, _HIDDEN)
    text = _URL_USER.sub(lambda found: f"{found['scheme']}{_HIDDEN}@", text)
    return _QUERY.sub(lambda found: f"{found['name']}{_HIDDEN}", text)


def redact_error(error: BaseException) -> None:
    """Redact the words of an error, and of those that it came from, whatever its kind."""
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        with suppress(Exception):  # some are made so that nobody can change them
            one.args = tuple(redact(arg) if isinstance(arg, str) else arg for arg in one.args)
        for name, value in [*vars(one).items(), ("filename", getattr(one, "filename", None))]:
            if isinstance(value, str) and (said := redact(value)) != value:
                with suppress(Exception):
                    setattr(one, name, said)
        waiting += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]


@contextmanager
def redacted() -> Iterator[None]:
    """No error that leaves this block, or a function that it decorates, says a secret."""
    try:
        yield
    except Exception as error:
        redact_error(error)
        raise


def _secrets() -> Iterator[str]:
    """Every secret of this process's environment, in all ways in which a message may write it."""
    for name, value in os.environ.items():
        if is_secret_name(name):
            yield from _written(value)
        elif found := credentials_in(_as_url(name, value)):
            user, password = found
            yield from _written(password or user)
            yield from _written(base64.b64encode(f"{user}:{password}".encode()).decode())


def _as_url(name: str, value: str) -> str:
    """The value as a URL, if it is one: of a proxy, `me:password@host:3128` is one too."""
    return f"http://{value}" if name.lower().endswith("_proxy") and "://" not in value else value


def _written(secret: str) -> Iterator[str]:
    if len(secret) >= _SHORTEST:
        yield from (secret, unquote(secret), quote(secret), quote(secret, safe=""), quote_plus(secret))


URI = "MLFLOW_TRACKING_URI"
_MLFLOW_USER, _MLFLOW_PASSWORD = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"

_as_given: dict[str, str] = {}


def take_credentials(uri: str) -> str:
    """The URI without what opens it, which this process keeps for MLflow.

    Those of a server go where MLflow looks for them, into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD of this
    process's environment, and out of its MLFLOW_TRACKING_URI. A database is opened by nothing but its whole URI.
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
    """The URI that `take_credentials` was given, in this process, where MLflow needs it."""
    return _as_given.get(uri, uri)
