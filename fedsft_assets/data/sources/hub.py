"""Downloads files of a Hugging Face hub repository into a download area: whole, verified, resumed after a break.

Session, authentication, lookups, metadata and offline mode are huggingface_hub's. The transfer is ours: as of 2.4,
`hf_hub_download` starts each call from zero and verifies no digest, and `http_get` below it loses up to 10 MiB at every
break, gives up at an answer 5xx, sleeps as long as a server asks, and prints addresses with their passwords. Xet is not
used: a transfer by Xet cannot resume in another process, and needs another service than HF_ENDPOINT.
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
    """Files of one commit: its full hash, and the path of each requested file, whole and verified."""

    commit: str
    paths: list[Path]


class Timing(NamedTuple):
    """Seconds. Connections have huggingface_hub's own, HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT."""

    waits: tuple[float, ...] = (1, 2, 4, 8)
    """Before the next attempt, after one, two and more in a row that brought nothing. One more is an error."""
    longest_wait: float = 120
    """The longest Retry-After of a server that is obeyed. More is an error."""
    progress: float = 10
    """Between two lines of progress of a file."""


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

    `into` is an area of this repository alone, and no file is written elsewhere. One that is there with the digest
    that the hub named is not requested again; a full commit whose files are all there needs no network. What arrives
    before a break or a kill stays, and the next call requests the rest. Calls for one area wait for each other.

    HF_ENDPOINT and HF_TOKEN are read at the call. The token goes to the endpoint, and to huggingface.co if the endpoint
    redirects there, never to a store. Raises HubError: offline without the files, no access, no such repository,
    revision or file, hub out of reach after some attempts, content that is not what the hub names, or a disk that
    cannot be written.
    """
    from huggingface_hub import is_offline_mode

    request = HubRequest.from_environment(repository, revision, kind)
    for file in files:
        if {"", ".", ".."} & set(file.split("/")):
            raise request.error("is not a path inside a repository; write it as the hub's page shows it", file)
    area = DownloadArea(into)
    try:
        if is_offline_mode():
            commit = _find(request, files, area)
        else:
            with area.locked():
                commit = _Download(request, timing).bring(files, area)
    except OSError as error:
        hint = "make it a folder that can be written, then start again"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            hint = "make room, then start again: what has arrived is kept"
        raise request.error(f"{into} cannot be used: {error.strerror or error}; {hint}") from error
    return HubFiles(commit, [area.path(commit, file) for file in files])


@redacted()
def resolve(repository: str, revision: str, *, kind: Kind = "dataset", timing: Timing = _TIMING) -> str:
    """The full hash of the commit that a branch, tag or abbreviated commit stands for now.

    A full hash is returned as it is, without the network. Raises HubError as `download` does.
    """
    from huggingface_hub import is_offline_mode

    request = HubRequest.from_environment(repository, revision, kind)
    if is_offline_mode() and not request.commit:
        raise request.error("HF_HUB_OFFLINE is set, so it cannot be looked up; name a full commit, or unset it")
    return _Download(request, timing).commit()


def _find(request: HubRequest, files: Sequence[str], area: DownloadArea) -> str:
    """The newest commit that the revision is known to have stood for, and of which the area has every file."""
    commits = [request.commit] if request.commit else area.commits(request.reference)
    for commit in reversed(commits):
        if all(area.has(commit, file) for file in files):
            return commit
    missing = [file for file in files if not commits or not area.has(commits[-1], file)]
    raise request.error(
        f"HF_HUB_OFFLINE is set, and {area.folder} has no whole {', '.join(missing) or 'copy'}; "
        "unset it to download, or bring the area from a machine that has it"
    )


@dataclass(frozen=True)
class _Download:
    """Requests for one revision, repeated while what fails may be over soon."""

    request: HubRequest
    timing: Timing

    def bring(self, files: Sequence[str], area: DownloadArea) -> str:
        """Have every file of the revision in the area; returns its commit."""
        commit = self.commit()
        for file in files:
            if not area.has(commit, file):
                self._fetch(commit, file, area)
        if not self.request.commit:
            area.remember(self.request.reference, commit)
        return commit

    def commit(self) -> str:
        """The full hash of the commit that the revision stands for."""
        return self.request.commit or self._attempt(self._look_up)

    def _look_up(self) -> str:
        from huggingface_hub import constants

        request, timeout = self.request, constants.HF_HUB_ETAG_TIMEOUT
        try:
            info = self._api.repo_info(
                request.repository, revision=request.revision, repo_type=request.kind, timeout=timeout
            )
            found = info.sha
        except (ValueError, KeyError, TypeError) as error:  # an answer that no hub gives
            found = getattr(error, "doc", error)
        if isinstance(found, str) and COMMIT.fullmatch(found):
            return found
        raise request.error(
            f"{request.endpoint} named no commit, found {excerpt(found)!r}; check HF_ENDPOINT and proxies"
        )

    def _fetch(self, commit: str, file: str, area: DownloadArea) -> None:
        """Have the file whole in the area; what was there under its name stays until then."""
        from huggingface_hub import hf_hub_url

        # Each attempt starts at the hub's address: that of the store, where it redirects to, expires.
        request = self.request
        url = hf_hub_url(request.repository, file, repo_type=request.kind, revision=commit, endpoint=request.endpoint)
        content = self._content(url, commit, file)
        if area.adopt(commit, file, content):
            return
        part = area.part(file, content.digest)
        for last in (False, True):  # what an earlier call left may be wrong: once is not enough to blame the hub
            found = self._transfer(url, file, content, part)
            if found == content.digest:
                area.keep(commit, file, part, content.digest)
                return
            part.unlink()
            wrong = f"has digest {found}, the hub names {content.digest}"
            if not last:
                _log.warning("%s: %s; restarting download; partial file discarded", request.title(file), wrong)
        raise request.error(
            f"{wrong}; the partial file was discarded: start again, and if it comes back check proxies and HF_ENDPOINT",
            file,
        )

    def _content(self, url: str, commit: str, file: str) -> Content:
        """What the hub says of a file: its size and the digest of its content."""
        found = self._attempt(lambda: self._api.get_hf_file_metadata(url=url), file)
        digest = found.etag or ""
        if not found.commit_hash or not _DIGEST.fullmatch(digest):
            raise self.request.error(
                f"expected a file of commit {commit} with its digest, found commit {found.commit_hash} and ETag"
                f" {digest!r} at {urlsplit(found.location).hostname}; check that HF_ENDPOINT is a hub that does not"
                " redirect elsewhere, and that proxies pass its headers on",
                file,
            )
        if found.commit_hash != commit:  # some mirrors serve what they have under a commit of their own
            _log.warning("%s: is commit %s, served as %s", self.request.title(file), commit, found.commit_hash)
        return Content(found.size, digest)

    def _transfer(self, url: str, file: str, content: Content, part: Path) -> str:
        """Receive all bytes of a file in `part`, from where it ends; returns their digest."""
        part.touch()
        if content.size is None or size_of(part) < content.size:
            self._attempt(lambda: self._receive(url, file, content.size, part), file, lambda: size_of(part))
        self._log_progress(file, size_of(part), size_of(part))
        return content_digest(part, like=content.digest)

    def _receive(self, url: str, file: str, size: int | None, part: Path) -> None:
        """Append one answer to `part`. Raises TransientError if it ends before `size`."""
        from huggingface_hub import constants, get_session, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers

        have = size_of(part)
        # Compressed on its way, a file would have another size, and its ranges would not be its own.
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
        headers = build_hf_headers(token=self._api.token, library_name=self._api.library_name, headers=headers)
        with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
            if response.status_code == 416:
                part.unlink()
                raise TransientError(f"{response.url.host} has no bytes after the {have} that are here")
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
        """What `send` returns. Called again after a failure that may be over soon, while `timing` allows it."""
        failures, most = 0, received()
        while True:
            try:
                with self.request.explained(file):
                    return send()
            except TransientError as failure:
                failures = 1 if received() > most else failures + 1
                most = max(most, received())
                if failures > len(self.timing.waits) or failure.wait > self.timing.longest_wait:
                    raise self._given_up(failure, failures, file) from failure
                wait = max(failure.wait, self.timing.waits[failures - 1])
                _log.warning("%s: %s; retrying in %.0f s", self.request.title(file), redact(str(failure)), wait)
            time.sleep(wait)

    def _given_up(self, failure: TransientError, failures: int, file: str | None) -> HubError:
        hint = f"check the network, proxies and HF_ENDPOINT ({self.request.endpoint})"
        if not self.request.token:
            hint += ", or set HF_TOKEN, without which hubs answer less often"
        return self.request.error(f"{failure} (failed attempts in a row: {failures}); start again later; {hint}", file)

    @property
    def _api(self) -> HfApi:
        from huggingface_hub import HfApi

        # False: no other token that the library may find on this machine.
        return HfApi(self.request.endpoint, token=self.request.token or False, library_name="fedsft-assets")

    def _log_progress(self, file: str, have: int, size: int | None, how: str = "") -> None:
        unit, name = (1e6, "MB") if max(have, size or 0) >= 1e6 else (1e3, "kB")
        total = "" if size is None else f" of {size / unit:.1f}"
        _log.info("%s: %s%.1f%s %s", self.request.title(file), how, have / unit, total, name)
