"""Brings files of a Hugging Face hub repository into a download area: whole, verified, and resumed where it stopped.

Addresses, errors and the HTTP client are huggingface_hub's. Its `hf_hub_download` is not used: as of 2.4 it
starts every call from zero, hashes nothing, reads the environment only when it is imported, and keeps caches
under HF_HOME.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple
from urllib.parse import quote

import orjson

from fedsft_assets.credentials import redact, redacted
from fedsft_assets.data.records import DataError, excerpt
from fedsft_assets.data.sources.download_area import Content, DownloadArea, Say, content_digest, size_of

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

Kind = Literal["dataset", "model"]

_ENDPOINT = "https://huggingface.co"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_PASSING_STATUS = (408, 429, 500, 502, 503, 504)
_REDIRECTS = 10
# Seconds. The waits between attempts of which none brought a byte; the longest that a Retry-After is obeyed;
# what a connection may take; the silence after which a transfer counts as cut; between two lines of progress,
# and at the latest.
_WAITS: tuple[float, ...] = (1, 2, 4, 8)
_LONGEST_WAIT = 120.0
_CONNECTING = 10.0
_SILENCE = 30.0
_SAY_EVERY = 2.0
_SAY_AT_LATEST = 30.0


class HubError(DataError):
    """The hub did not give what was asked for: the message says what was asked, what was found and what to do."""


class HubFiles(NamedTuple):
    """Files of one commit: the commit's full hash, and a path for each asked file, whole and verified."""

    commit: str
    paths: list[Path]


@redacted()
def download(
    repository: str, revision: str, files: Sequence[str], into: Path, *, kind: Kind = "dataset", say: Say = print
) -> HubFiles:
    """The files of a repository at a revision, each at `into/<commit>/<file>`.

    `into` is an area of this repository alone, and nothing is written elsewhere. A file that is there, and
    still has the digest that the hub named, is not asked for again; a full commit whose files are all there
    needs no network. What arrives before a cut or a kill stays, and the next call asks for the rest. A call
    waits for another one in the same area. `say` gets lines of progress.

    HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE count as they are at the call. Raises HubError: offline without
    the files, no access, no such repository, revision or file, hub out of reach after some attempts, content
    that is not what the hub names, or a disk that does not take it.
    """
    asked = _Asked.now(repository, revision, kind, files)
    area = DownloadArea(into)
    try:
        if _offline():
            commit = _commit_in(area, asked, files)
        else:
            with area.locked(say):
                commit = _bring(area, asked, files, say)
    except OSError as error:
        raise asked.error(f"{into} cannot be used: {error.strerror or error}; {_disk_advice(error)}") from error
    return HubFiles(commit, [area.path(commit, file) for file in files])


@redacted()
def resolve(repository: str, revision: str, *, kind: Kind = "dataset") -> str:
    """The full hash of the commit that a branch, tag or abbreviated commit stands for now.

    A full hash is returned as it is, without the network. Raises HubError as `download` does.
    """
    asked = _Asked.now(repository, revision, kind)
    if asked.commit:
        return asked.commit
    if _offline():
        raise asked.error("HF_HUB_OFFLINE is set, so it cannot be looked up; name a full commit, or unset it")
    with _Hub.reached(asked, say=lambda _: None) as hub:
        return hub.commit()


def _bring(area: DownloadArea, asked: _Asked, files: Sequence[str], say: Say) -> str:
    """Have every file of the revision in the area; returns its commit."""
    with _Hub.reached(asked, say) as hub:
        commit = asked.commit or hub.commit()
        for file in files:
            if not area.has(commit, file):
                hub.fetch(commit, file, area)
    if not asked.commit:
        area.remember(asked.reference, commit)
    return commit


def _commit_in(area: DownloadArea, asked: _Asked, files: Sequence[str]) -> str:
    """The newest commit that the revision is known to have stood for, and of which the area has every file."""
    commits = [asked.commit] if asked.commit else area.commits(asked.reference)
    for commit in reversed(commits):
        if all(area.has(commit, file) for file in files):
            return commit
    missing = [file for file in files if not commits or not area.has(commits[-1], file)]
    raise asked.error(
        f"HF_HUB_OFFLINE is set, and {area.folder} has no whole {', '.join(missing) or 'copy'}; "
        "unset it to download, or bring the area from a machine that has it"
    )


@dataclass(frozen=True)
class _Asked:
    """What is asked for, and of whom, by the environment at this moment."""

    repository: str
    revision: str
    kind: Kind
    endpoint: str
    token: str | None

    @classmethod
    def now(cls, repository: str, revision: str, kind: Kind, files: Sequence[str] = ()) -> _Asked:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        endpoint = (os.environ.get("HF_ENDPOINT") or _ENDPOINT).rstrip("/")
        if not re.fullmatch(r"https?://[^\s/]+(/\S*)?", endpoint):
            raise HubError(f"HF_ENDPOINT: {redact(endpoint)!r} is not an address; give one such as {_ENDPOINT}")
        token = os.environ.get("HF_TOKEN", "").strip() or None
        if token and not re.fullmatch(r"[!-~]+", token):
            raise HubError("HF_TOKEN: has spaces or letters that no token has; copy it anew from the hub's settings")
        asked = cls(repository, revision, kind, endpoint, token)
        try:
            validate_repo_id(repository)
        except HFValidationError as error:
            raise asked.error(f"is not the name of a repository ({error}); write it as owner/name") from error
        for file in files:
            if {"", ".", ".."} & set(file.split("/")):
                raise asked.error("is not a path inside a repository; write it as the hub's page shows it", file)
        return asked

    @property
    def commit(self) -> str | None:
        """The revision, if it is the full hash of a commit."""
        return self.revision if _COMMIT.fullmatch(self.revision) else None

    @property
    def page(self) -> str:
        """Where a person finds the repository."""
        return f"{self.endpoint}/{'datasets/' if self.kind == 'dataset' else ''}{self.repository}"

    @property
    def reference(self) -> str:
        """The revision's name on disk, apart from those of other repositories."""
        return quote(f"{self.kind}s/{self.repository}@{self.revision}", safe="")

    def error(self, text: str, file: str | None = None) -> HubError:
        return HubError(redact(f"{self.page}: revision {self.revision}: {f'{file}: ' if file else ''}{text}"))

    def refusal(self, error: HfHubHTTPError, file: str | None) -> HubError:
        """What an answer of the hub means that no second attempt will change."""
        from huggingface_hub.errors import (
            GatedRepoError,
            RemoteEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        status = error.response.status_code
        answer = f"{error.response.url.host} answered {status} {error.response.reason_phrase}"
        if isinstance(error, RevisionNotFoundError):
            return self.error("the repository has no such revision; correct the revision")
        if isinstance(error, RemoteEntryNotFoundError):
            return self.error("the repository has no such file at this revision; correct the file's name", file)
        if isinstance(error, GatedRepoError):
            return self.error(f"{answer}: access is gated; {self._gate_advice}", file)
        by_hub = isinstance(error, RepositoryNotFoundError) or str(error.response.url).startswith(self.endpoint)
        if status in (401, 403) and by_hub:
            said = f" ({excerpt(error.server_message)})" if error.server_message else ""
            return self.error(f"{answer}{said}: no access, or no such repository; {self._token_advice}", file)
        if isinstance(error, RepositoryNotFoundError):
            return self.error(f"there is no such {self.kind} repository, or none to see; correct its name", file)
        return self.error(f"{answer}; see {self.page}, then start again", file)

    @property
    def _gate_advice(self) -> str:
        if self.token:
            return f"HF_TOKEN is set, but its account or its permissions do not open it: ask for access at {self.page}"
        return f"accept its terms at {self.page}, then set HF_TOKEN to a token of that account"

    @property
    def _token_advice(self) -> str:
        if self.token:
            return f"HF_TOKEN is set, but does not open it: check that it is valid and may read {self.page}"
        return "correct the name, or set HF_TOKEN to a token that may read it"


class _Passing(Exception):
    """Something that may be over in a moment; `wait` is how many seconds the hub asks to wait, if it does."""

    def __init__(self, text: str, advice: str, wait: float = 0) -> None:
        super().__init__(text)
        self.advice = advice
        self.wait = wait


@dataclass(frozen=True)
class _Hub:
    """One repository, reached over plain HTTP.

    Not over Xet, although the hub offers it for large files: a transfer by Xet cannot go on after the process
    died, and needs another service than HF_ENDPOINT. The client is our own: huggingface_hub's is shared by the
    whole process, and refuses or allows requests as HF_HUB_OFFLINE was when it was imported.
    """

    asked: _Asked
    client: httpx2.Client
    say: Say

    @classmethod
    @contextmanager
    def reached(cls, asked: _Asked, say: Say) -> Iterator[_Hub]:
        import httpx2

        # Compressed on its way, a file would have another size, and none of its parts would be its own.
        headers = {"User-Agent": "fedsft-assets", "Accept-Encoding": "identity"}
        if asked.token:
            headers["Authorization"] = f"Bearer {asked.token}"
        try:
            client = httpx2.Client(headers=headers, timeout=httpx2.Timeout(_SILENCE, connect=_CONNECTING))
        except (OSError, ValueError, ImportError, httpx2.InvalidURL) as error:
            raise asked.error(f"no connection can be made: {error}; check proxy variables and SSL_CERT_FILE") from error
        with client:
            yield cls(asked, client, say)

    def commit(self) -> str:
        """The full hash of the commit that the asked revision stands for."""
        name, revision = self.asked.repository, quote(self.asked.revision, safe="")
        url = f"{self.asked.endpoint}/api/{self.asked.kind}s/{name}/revision/{revision}"
        response = self._answer(lambda: self.client.get(url, follow_redirects=True))
        try:
            found = orjson.loads(response.content)["sha"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            found = None
        if not isinstance(found, str) or not _COMMIT.fullmatch(found):
            raise self.asked.error(
                f"{url} named no commit, found {excerpt(response.content)!r}; check HF_ENDPOINT and proxies"
            )
        return found

    def fetch(self, commit: str, file: str, area: DownloadArea) -> None:
        """Have the file whole in the area; what was there under its name stays until then."""
        from huggingface_hub import hf_hub_url

        asked = self.asked
        url = hf_hub_url(asked.repository, file, repo_type=asked.kind, revision=commit, endpoint=asked.endpoint)
        content = self._content(url, commit, file)
        if area.adopt(commit, file, content):
            return
        part = area.part(file, content.digest)
        found = self._transfer(url, file, content, part)
        if found != content.digest:
            # It may be that only an old part was bad, so that once is not enough to blame the hub.
            self.say(f"{self._title(file)}: has digest {found}, not {content.digest}; restarting the download")
            part.unlink()
            found = self._transfer(url, file, content, part)
        if found != content.digest:
            part.unlink()
            raise asked.error(
                f"has digest {found}, the hub names {content.digest}; the partial file was discarded: start again, and"
                " if it comes back check proxies and HF_ENDPOINT",
                file,
            )
        area.keep(commit, file, part, content.digest)

    def _content(self, url: str, commit: str, file: str) -> Content:
        response = self._answer(lambda: self._head(url), file)
        headers = response.headers
        # A large file's own ETag is the store's; the linked one is its SHA-256.
        digest = (headers.get("X-Linked-ETag") or headers.get("ETag") or "").removeprefix("W/").strip('"')
        served = headers.get("X-Repo-Commit")
        if not served or not _DIGEST.fullmatch(digest):
            raise self.asked.error(
                f"expected a file of commit {commit} with its digest, found commit {served} and ETag {digest!r}; "
                "check that HF_ENDPOINT is a hub, and that proxies pass its headers on",
                file,
            )
        if served != commit:  # some mirrors serve what they have under a commit of their own
            self.say(f"{self._title(file)}: was asked for at commit {commit}, and is served as commit {served}")
        size = headers.get("X-Linked-Size")
        if size is None and not response.is_redirect:
            size = headers.get("Content-Length")
        return Content(int(size) if size and size.isdecimal() else None, digest)

    def _head(self, url: str) -> httpx2.Response:
        """The answer that describes a file. A store that it may point to knows neither commit nor digest."""
        response = self.client.head(url)
        for _ in range(_REDIRECTS):
            described = "X-Repo-Commit" in response.headers and "X-Linked-ETag" in response.headers
            if response.next_request is None or described:
                break
            response = self.client.send(response.next_request)
        return response

    def _transfer(self, url: str, file: str, content: Content, part: Path) -> str:
        """Have all bytes of a file in `part`, going on where it ends; returns their digest."""
        progress = _Progress(self.say, self._title(file), content.size)
        part.touch()
        most, failures = size_of(part), 0
        while content.size is None or size_of(part) < content.size:
            try:
                self._receive(url, file, part, progress)
                if content.size is None:
                    break
                if size_of(part) < content.size:
                    raise _Passing(f"the transfer ended after {size_of(part)} of {content.size} bytes", "start again")
            except _Passing as trouble:
                failures = 1 if size_of(part) > most else failures + 1
                most = max(most, size_of(part))
                self._wait(trouble, failures, file)
        progress.done(size_of(part))
        return content_digest(part, like=content.digest)

    def _receive(self, url: str, file: str, part: Path, progress: _Progress) -> None:
        """Append to `part` what one answer brings. Raises _Passing if it is cut."""
        from huggingface_hub.utils import hf_raise_for_status

        have = size_of(part)
        headers = {"Range": f"bytes={have}-"} if have else {}
        # The hub's own address each time: the one of the store that it points to expires.
        with self._told(file), self.client.stream("GET", url, headers=headers, follow_redirects=True) as response:
            if response.status_code == 416:
                part.unlink()
                raise _Passing(f"{response.url.host} has no bytes after the {have} that are here", "start again")
            hf_raise_for_status(response)
            resumed = response.status_code == 206
            progress.start(have if resumed else 0)
            with part.open("ab" if resumed else "wb") as target:
                for chunk in response.iter_bytes():
                    target.write(chunk)
                    progress.add(len(chunk))

    def _answer(self, send: Callable[[], httpx2.Response], file: str | None = None) -> httpx2.Response:
        """The answer to a request without a body worth keeping, asked again while the trouble may pass."""
        from huggingface_hub.utils import hf_raise_for_status

        failures = 0
        while True:
            try:
                with self._told(file):
                    response = send()
                    hf_raise_for_status(response)
                    return response
            except _Passing as trouble:
                failures += 1
                self._wait(trouble, failures, file)

    @contextmanager
    def _told(self, file: str | None) -> Iterator[None]:
        """Turns what the client and the hub's answers raise into _Passing or HubError."""
        import httpx2
        from huggingface_hub.errors import HfHubHTTPError

        try:
            yield
        except HfHubHTTPError as error:
            response = error.response
            if response.status_code not in _PASSING_STATUS:
                raise self.asked.refusal(error, file) from error
            wait = response.headers.get("Retry-After", "")
            text = f"{response.url.host} answered {response.status_code} {response.reason_phrase}"
            advice = "wait, then start again" if self.asked.token else "wait, or set HF_TOKEN; then start again"
            raise _Passing(text, advice, float(wait) if wait.isdecimal() else 0) from error
        except httpx2.TransportError as error:
            advice = f"check the network, proxies and HF_ENDPOINT ({self.asked.endpoint}); then start again"
            raise _Passing(str(error) or type(error).__name__, advice) from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise self.asked.error(f"cannot be asked for: {error}; check HF_ENDPOINT", file) from error

    def _wait(self, trouble: _Passing, failures: int, file: str | None) -> None:
        """Wait before the next attempt. Raises HubError instead after the last, or if the wait is too long."""
        if trouble.wait > _LONGEST_WAIT:
            raise self.asked.error(f"{trouble} and asks to wait {trouble.wait:.0f} s; {trouble.advice}", file)
        if failures > len(_WAITS):
            raise self.asked.error(f"{trouble} ({failures} times in a row); {trouble.advice}", file) from trouble
        wait = max(trouble.wait, _WAITS[failures - 1])
        self.say(redact(f"{self._title(file)}: {trouble}; trying again in {wait:.0f} s"))
        time.sleep(wait)

    def _title(self, file: str | None) -> str:
        return f"{self.asked.repository} · {file or self.asked.revision}"


class _Progress:
    """Says how much of a file is here, in few lines."""

    def __init__(self, say: Say, title: str, total: int | None) -> None:
        self._say, self._title, self._total = say, title, total
        self._have = self._said = 0
        self._when = time.monotonic()

    def start(self, have: int) -> None:
        """An answer begins, after `have` bytes that are here."""
        self._have = have
        if have:
            self._tell("going on at ")

    def add(self, size: int) -> None:
        self._have += size
        quiet = time.monotonic() - self._when
        tenth = self._have - self._said >= (self._total or self._have) / 10
        if quiet >= _SAY_EVERY and (tenth or quiet >= _SAY_AT_LATEST):
            self._tell()

    def done(self, have: int) -> None:
        self._total = self._have = have
        self._tell()

    def _tell(self, how: str = "") -> None:
        unit, name = (1e6, "MB") if max(self._have, self._total or 0) >= 1e6 else (1e3, "kB")
        total = "" if self._total is None else f" of {self._total / unit:.1f}"
        self._say(f"{self._title}: {how}{self._have / unit:.1f}{total} {name}")
        self._said, self._when = self._have, time.monotonic()


def _offline() -> bool:
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in {"1", "ON", "YES", "TRUE"}


def _disk_advice(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "make room, then start again: what has arrived is kept"
    return "make it a folder that can be written, then start again"
