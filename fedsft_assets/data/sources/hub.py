"""Verified, resumable downloads from a Hugging Face Hub repository into a download area.

Session, authentication, lookups, metadata and offline mode are huggingface_hub's. The transfer is ours: as of 2.4,
`hf_hub_download` starts each call from zero and verifies no digest, and the underlying `http_get` loses up to 10 MiB at
every interruption, gives up on a 5xx response, sleeps as long as a server asks, and prints URLs with their passwords.
Xet is not used: its transfers cannot resume in another process, and need a service besides HF_ENDPOINT.
"""

from __future__ import annotations

import errno
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar
from urllib.parse import urlsplit

from fedsft_assets.credentials import redact, redacted
from fedsft_assets.data.records import excerpt
from fedsft_assets.data.sources.download_area import Content, DownloadArea, content_digest, size_of
from fedsft_assets.data.sources.hub_request import COMMIT, HubError, HubRequest, Kind, TransientError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_log = logging.getLogger(__name__)
T = TypeVar("T")


class HubFiles(NamedTuple):
    """Files of one commit: its full hash, and the path of each requested file, complete and verified."""

    commit: str
    paths: list[Path]


class Timing(NamedTuple):
    """Intervals in seconds. Connection timeouts are HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT."""

    waits: tuple[float, ...] = (1, 2, 4, 8)
    """Delays after one, two and more consecutive attempts without progress. One more failure is an error."""
    longest_wait: float = 120
    """The longest Retry-After to honor. A longer one is an error."""
    progress: float = 10
    """Time between progress lines of a file."""


_TIMING = Timing()


@redacted()
def download(
    repository: str,
    revision: str,
    files: Sequence[str],
    into: Path,
    *,
    kind: Kind = "dataset",
    timing: Timing = _TIMING,
) -> HubFiles:
    """Download files of a repository at a revision, each to `into/<commit>/<file>`.

    `into` is for this repository alone, and nothing is written elsewhere. Files that are present with the hub's
    digest are not requested again; a full commit whose files are all present needs no network. Partial downloads
    survive an interruption, and the next call resumes them. Concurrent calls for one area wait for each other.

    HF_ENDPOINT and HF_TOKEN are read on each call. The token goes to the endpoint, and to huggingface.co if the
    endpoint redirects there, never to a storage host. Raises HubError if offline without the files; without access;
    if there is no such repository, revision or file; if the hub stays unreachable; if content does not match the
    hub's digest; or if `into` is not writable.
    """
    from huggingface_hub import is_offline_mode

    request = HubRequest.from_environment(repository, revision, kind)
    for file in files:
        if {"", ".", ".."} & set(file.split("/")):
            raise request.error("is not a path inside a repository; write it as shown on the hub's page", file)
    area = DownloadArea(into)
    try:
        if is_offline_mode():
            commit = _find_offline(request, files, area)
        else:
            with area.locked():
                commit = _Download(request, timing).ensure(files, area)
    except OSError as error:
        hint = "make it a writable folder, then start again"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "free some disk space, then start again: partial downloads are kept"
        raise request.error(f"{into} cannot be used: {error.strerror or error}; {hint}") from error
    return HubFiles(commit, [area.path(commit, file) for file in files])


@redacted()
def resolve(repository: str, revision: str, *, kind: Kind = "dataset", timing: Timing = _TIMING) -> str:
    """The full hash of the commit that a branch, tag or abbreviated commit currently points to.

    A full hash is returned unchanged, without the network. Raises HubError as `download` does.
    """
    from huggingface_hub import is_offline_mode

    request = HubRequest.from_environment(repository, revision, kind)
    if is_offline_mode() and not request.commit:
        raise request.error(
            "HF_HUB_OFFLINE is set, so it cannot be looked up; give a full commit hash, or unset HF_HUB_OFFLINE"
        )
    return _Download(request, timing).commit()


def _find_offline(request: HubRequest, files: Sequence[str], area: DownloadArea) -> str:
    """The newest commit that the revision is known to have pointed to and whose files are all in the area."""
    commits = [request.commit] if request.commit else area.commits(request.reference)
    for commit in reversed(commits):
        if all(area.has(commit, file) for file in files):
            return commit
    missing = [file for file in files if not commits or not area.has(commits[-1], file)]
    raise request.error(
        f"HF_HUB_OFFLINE is set, and {area.folder} has no complete {', '.join(missing) or 'copy'}; "
        "unset HF_HUB_OFFLINE to download, or copy the folder from a machine that has it"
    )


@dataclass(frozen=True)
class _Download:
    """Requests for one revision, with retries after transient failures."""

    request: HubRequest
    timing: Timing

    def ensure(self, files: Sequence[str], area: DownloadArea) -> str:
        """Ensure that the area has these files of the revision; return its commit."""
        commit = self.commit()
        for file in files:
            if not area.has(commit, file):
                self._fetch(commit, file, area)
        if not self.request.commit:
            area.remember(self.request.reference, commit)
        return commit

    def commit(self) -> str:
        """The full hash of the commit that the revision points to."""
        return self.request.commit or self._attempt(self._look_up)

    def _look_up(self) -> str:
        from huggingface_hub import constants

        request, timeout = self.request, constants.HF_HUB_ETAG_TIMEOUT
        try:
            info = self._api.repo_info(
                request.repository, revision=request.revision, repo_type=request.kind, timeout=timeout
            )
            found = info.sha
        except (ValueError, KeyError, TypeError) as error:  # not a hub's response
            found = getattr(error, "doc", error)
        if isinstance(found, str) and COMMIT.fullmatch(found):
            return found
        raise request.error(
            f"{request.endpoint} returned no commit, found {excerpt(found)!r}; check HF_ENDPOINT and proxies"
        )

    def _fetch(self, commit: str, file: str, area: DownloadArea) -> None:
        """Download a file into the area; any file of that name stays until the new one is complete."""
        from huggingface_hub import hf_hub_url

        # Each attempt starts at the hub's URL: the storage URL that it redirects to expires.
        request = self.request
        url = hf_hub_url(request.repository, file, repo_type=request.kind, revision=commit, endpoint=request.endpoint)
        content = self._content(url, commit, file)
        if area.adopt(commit, file, content):
            return
        part = area.part(file, content.digest)
        for last in (False, True):  # the first mismatch may be due to an earlier call's partial file
            found = self._transfer(url, file, content, part)
            if found == content.digest:
                area.keep(commit, file, part, content.digest)
                return
            part.unlink()
            wrong = f"has digest {found}, expected {content.digest} from the hub"
            if not last:
                _log.warning("%s: %s; restarting download; partial file discarded", request.title(file), wrong)
        raise request.error(
            f"{wrong}; the partial file was discarded: start again, and if the error recurs, check proxies and "
            "HF_ENDPOINT",
            file,
        )

    def _content(self, url: str, commit: str, file: str) -> Content:
        """A file's size and digest according to the hub."""
        found = self._attempt(lambda: self._api.get_hf_file_metadata(url=url), file)
        digest = found.etag or ""
        if not found.commit_hash or not _DIGEST.fullmatch(digest):
            raise self.request.error(
                f"expected a file of commit {commit} with its digest, found commit {found.commit_hash} and ETag"
                f" {digest!r} at {urlsplit(found.location).hostname}; check that HF_ENDPOINT is a hub that does not"
                " redirect elsewhere, and that proxies pass its headers on",
                file,
            )
        if found.commit_hash != commit:  # some mirrors serve files under commits of their own
            _log.warning("%s: requested commit %s, served as %s", self.request.title(file), commit, found.commit_hash)
        return Content(found.size, digest)

    def _transfer(self, url: str, file: str, content: Content, part: Path) -> str:
        """Complete the partial download in `part`; return the digest of its content."""
        part.touch()
        if content.size is None or size_of(part) < content.size:
            self._attempt(lambda: self._receive(url, file, content.size, part), file, lambda: size_of(part))
        self._log_progress(file, size_of(part), size_of(part))
        return content_digest(part, like=content.digest)

    def _receive(self, url: str, file: str, size: int | None, part: Path) -> None:
        """Append one response to `part`. Raises TransientError if it ends before `size` bytes."""
        from huggingface_hub import constants, get_session, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers

        have = size_of(part)
        # Compression would change the size and the meaning of byte ranges.
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
        headers = build_hf_headers(token=self._api.token, library_name=self._api.library_name, headers=headers)
        with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
            if response.status_code == 416:
                part.unlink()
                raise TransientError(f"{response.url.host} has no bytes after the first {have}")
            hf_raise_for_status(response)
            if response.status_code != 206:
                have = 0
            if have:
                self._log_progress(file, have, size, "resuming at ")
            logged = time.monotonic()
            with part.open("ab" if have else "wb") as target:
                for chunk in response.iter_bytes():
                    have += target.write(chunk)
                    if time.monotonic() - logged >= self.timing.progress:
                        self._log_progress(file, have, size)
                        logged = time.monotonic()
        if size is not None and have < size:
            raise TransientError(f"the transfer ended after {have} of {size} bytes")

    def _attempt(self, send: Callable[[], T], file: str | None = None, received: Callable[[], int] = lambda: 0) -> T:
        """Call `send`, again after transient failures as `timing` allows; return its result."""
        failures, most = 0, received()
        while True:
            try:
                with self.request.translate_errors(file):
                    return send()
            except TransientError as failure:
                failures = 1 if received() > most else failures + 1
                most = max(most, received())
                if failures > len(self.timing.waits) or failure.wait > self.timing.longest_wait:
                    raise self._attempts_exhausted(failure, failures, file) from failure
                wait = max(failure.wait, self.timing.waits[failures - 1])
                _log.warning("%s: %s; retrying in %.0f s", self.request.title(file), redact(str(failure)), wait)
            time.sleep(wait)

    def _attempts_exhausted(self, failure: TransientError, failures: int, file: str | None) -> HubError:
        hint = f"check the network, proxies and HF_ENDPOINT ({self.request.endpoint})"
        if not self.request.token:
            hint += ", or set HF_TOKEN, since hubs rate-limit anonymous requests more strictly"
        return self.request.error(f"{failure} (failed attempts in a row: {failures}); start again later; {hint}", file)

    @property
    def _api(self) -> HfApi:
        from huggingface_hub import HfApi

        # False: do not use a token that the library finds elsewhere on this machine.
        return HfApi(self.request.endpoint, token=self.request.token or False, library_name="fedsft-assets")

    def _log_progress(self, file: str, have: int, size: int | None, prefix: str = "") -> None:
        unit, name = (1e6, "MB") if max(have, size or 0) >= 1e6 else (1e3, "kB")
        total = "" if size is None else f" of {size / unit:.1f}"
        _log.info("%s: %s%.1f%s %s", self.request.title(file), prefix, have / unit, total, name)
