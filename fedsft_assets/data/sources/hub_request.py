"""Hub requests, and errors that name the request and say what to do."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

from fedsft_assets.credentials import redact
from fedsft_assets.data.records import DataError, excerpt

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

Kind = Literal["dataset", "model"]
COMMIT = re.compile(r"[0-9a-f]{40}")
_ENDPOINT = "https://huggingface.co"
_TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)


class HubError(DataError):
    """A failed request; the message says what was requested, what was found and what to do."""


class TransientError(Exception):
    """A failure that a retry may fix; `wait` is the delay in seconds that the server asks for."""

    def __init__(self, text: str, wait: float = 0) -> None:
        super().__init__(text)
        self.wait = wait


@dataclass(frozen=True)
class HubRequest:
    """A revision of a repository, with the endpoint and token from the environment."""

    repository: str
    revision: str
    kind: Kind
    endpoint: str
    token: str | None

    @classmethod
    def from_environment(cls, repository: str, revision: str, kind: Kind) -> HubRequest:
        """Read HF_ENDPOINT and HF_TOKEN. Raises HubError if one of them or the repository's name is malformed."""
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        endpoint = (os.environ.get("HF_ENDPOINT") or _ENDPOINT).rstrip("/")
        if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", endpoint):
            raise HubError(f"HF_ENDPOINT: {redact(endpoint)!r} is not a URL; set it to one such as {_ENDPOINT}")
        token = os.environ.get("HF_TOKEN", "").strip() or None
        if token and not re.fullmatch(r"[!-~]+", token):
            raise HubError("HF_TOKEN: has characters that no token has; copy it again from the hub's settings")
        request = cls(repository, revision, kind, endpoint, token)
        try:
            validate_repo_id(repository)
        except HFValidationError as error:
            raise request.error(f"is not a valid repository name ({error}); write it as owner/name") from error
        return request

    @property
    def commit(self) -> str | None:
        """The revision, if it is the full hash of a commit."""
        return self.revision if COMMIT.fullmatch(self.revision) else None

    @property
    def reference(self) -> str:
        """The revision's name on disk, unique across repositories."""
        return quote(f"{self.kind}s/{self.repository}@{self.revision}", safe="")

    def title(self, file: str | None) -> str:
        return f"{self.repository} · {file or self.revision}"

    def error(self, text: str, file: str | None = None) -> HubError:
        return HubError(redact(f"{self._page}: revision {self.revision}: {f'{file}: ' if file else ''}{text}"))

    @contextmanager
    def translate_errors(self, file: str | None) -> Iterator[None]:
        """Turn errors of huggingface_hub into TransientError or HubError."""
        import httpx2
        from huggingface_hub import get_session
        from huggingface_hub.errors import HfHubHTTPError

        try:
            get_session()
        except (OSError, ValueError, ImportError, httpx2.InvalidURL) as error:
            raise self.error(f"cannot connect: {error}; check the proxy variables and SSL_CERT_FILE") from error
        try:
            yield
        except HfHubHTTPError as error:
            if error.response.status_code not in _TRANSIENT_STATUS:
                raise self._permanent_failure(error, file) from error
            wait = error.response.headers.get("Retry-After", "")
            if wait.isdecimal():
                raise TransientError(f"{_answer(error)} and asks to wait {wait} s", float(wait)) from error
            raise TransientError(_answer(error)) from error
        except httpx2.TransportError as error:
            raise TransientError(str(error) or type(error).__name__) from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise self.error(f"request failed: {error}; check HF_ENDPOINT", file) from error

    def _permanent_failure(self, error: HfHubHTTPError, file: str | None) -> HubError:
        """The error for a response that a retry would not change."""
        from huggingface_hub import errors

        answer, status = _answer(error), error.response.status_code
        token = "HF_TOKEN is set but grants no access" if self.token else "HF_TOKEN is not set"
        by_hub = isinstance(error, errors.RepositoryNotFoundError) or str(error.response.url).startswith(self.endpoint)
        if isinstance(error, errors.RevisionNotFoundError):
            return self.error("the repository has no such revision; correct the revision")
        if isinstance(error, errors.RemoteEntryNotFoundError):
            return self.error("the repository has no such file at this revision; correct the file's name", file)
        if isinstance(error, errors.GatedRepoError):
            hint = f"accept its terms at {self._page}, and set HF_TOKEN to a token of that account"
            return self.error(f"{answer}: access is gated, and {token}; {hint}", file)
        if status in (401, 403) and by_hub:
            reason = f" ({excerpt(error.server_message)})" if error.server_message else ""
            hint = "correct the name, or set HF_TOKEN to a valid token with read access"
            return self.error(f"{answer}{reason}: no access, or no such repository, and {token}; {hint}", file)
        if isinstance(error, errors.RepositoryNotFoundError):
            return self.error(f"there is no such {self.kind} repository, or no access to it; correct its name", file)
        return self.error(f"{answer}; see {self._page}, then start again", file)

    @property
    def _page(self) -> str:
        """The repository's web page."""
        return f"{self.endpoint}/{'datasets/' if self.kind == 'dataset' else ''}{self.repository}"


def _answer(error: HfHubHTTPError) -> str:
    response = error.response
    return f"{response.url.host} answered {response.status_code} {response.reason_phrase}"
