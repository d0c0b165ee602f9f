"""The Hugging Face hub's protocol on loopback: serves folders as repositories, and can be made to fail.

Only what a download needs: `/api/…/revision/…`, `/…/resolve/…` and where that leads to. As the hub does, a
large file is a redirect to a store on another host, any other file one to a cache on the same host.
"""

import hashlib
import json
import re
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self
from urllib.parse import unquote

_CHUNK = 1 << 16
_FLIPPED = bytes(byte ^ 1 for byte in range(256))
_API = re.compile(r"/api/(datasets|models)/([^/]+/[^/]+)/revision/([^/]+)")
_RESOLVE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_CACHE = re.compile(r"/api/resolve-cache/(datasets|models)/([^/]+/[^/]+)/([^/]+)/(.+)")
_STORE = re.compile(r"/store/(datasets|models)/([^/]+/[^/]+)/([^/]+)/(.+)")


class Request(NamedTuple):
    """What a client asked."""

    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class Trouble:
    """What goes wrong with the next `times` requests of this method whose path contains `match`.

    With a status, the request is answered by it. Otherwise the bytes of the file are: cut before byte
    `cut_at` of the file, `wrong`, sent whole whatever Range asks, or in chunks with a `pause` before each.
    """

    match: str
    method: str = "GET"
    times: float = 1
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    cut_at: int | None = None
    wrong: bool = False
    whole: bool = False
    pause: float = 0


class HubServer:
    """A hub with these repositories, each a folder by its `owner/name`, while the `with` block runs.

    `main` stands for `commit_of(repository)` until `push` moves it. A full commit that nobody pushed has the
    files that the repository started with.
    """

    def __init__(self, datasets: Mapping[str, Path], models: Mapping[str, Path] | None = None) -> None:
        self.requests: list[Request] = []
        self.troubles: list[Trouble] = []
        self.token: str | None = None  # that requests must have
        self.gated = False
        self.large = {".parquet", ".nemo", ".safetensors"}  # suffixes of files in the store
        self.hidden: set[str] = set()  # headers that answers to HEAD lack
        self._folders = {"datasets": dict(datasets), "models": dict(models or {})}
        self._pushed: dict[tuple[str, str], Path] = {}
        self._branches: dict[tuple[str, str], str] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def store(self) -> str:
        """The same server by another name, so that clients take it for another host."""
        return f"http://localhost:{self._server.server_port}"

    def push(self, repository: str, folder: Path, branch: str = "main") -> str:
        """Move a branch to a new commit with the files of this folder; returns the commit."""
        commit = hashlib.sha1(f"{repository} {branch} {len(self._pushed)}".encode()).hexdigest()
        self._pushed[repository, commit] = folder
        self._branches[repository, branch] = commit
        return commit

    def ranges(self, file: str) -> list[str | None]:
        """The Range headers of the requests that the bytes of a file were asked with."""
        places = ("/store/", "/api/resolve-cache/")
        return [r.range for r in self.requests if r.method == "GET" and r.path.startswith(places) and file in r.path]

    def commit(self, repository: str, revision: str) -> str | None:
        if re.fullmatch(r"[0-9a-f]{40}", revision):
            return revision
        return self._branches.get((repository, revision)) or (commit_of(repository) if revision == "main" else None)

    def folder(self, kind: str, repository: str, commit: str | None = None) -> Path | None:
        return self._pushed.get((repository, commit or "")) or self._folders[kind].get(repository)

    def trouble(self, request: Request, with_status: bool) -> Trouble | None:
        with self._lock:
            for trouble in self.troubles:
                hit = trouble.times > 0 and trouble.method == request.method and trouble.match in request.path
                if hit and (trouble.status is not None) == with_status:
                    trouble.times -= 1
                    return trouble
        return None


def commit_of(repository: str) -> str:
    """What `main` of a repository stands for at first."""
    return hashlib.sha1(repository.encode()).hexdigest()


def git_digest(content: bytes) -> str:
    """The name that git gives a blob (https://git-scm.com/book/en/v2/Git-Internals-Git-Objects)."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or the client waits for each small body

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        with suppress(ConnectionError):  # a client that was killed
            self._serve()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _serve(self) -> None:
        asked = Request(self.command, unquote(self.path), self.headers["Range"], self.headers["Authorization"])
        self.asked = asked
        self.hub.requests.append(asked)
        trouble = self.hub.trouble(asked, with_status=True)
        if trouble and trouble.status:
            self._answer(trouble.status, trouble.headers, b"<html>trouble</html>")
        elif found := _STORE.fullmatch(self.path):
            self._file(*found.groups())
        elif refusal := self._refusal():
            self._error(*refusal)
        elif found := _API.fullmatch(self.path):
            self._api(*found.groups())
        elif found := _CACHE.fullmatch(self.path):
            self._file(*found.groups())
        elif found := _RESOLVE.fullmatch(self.path):
            self._resolve(found[1] or "models", *found.groups()[1:])
        else:
            self._error(404, "", "Not found")

    def _refusal(self) -> tuple[int, str, str] | None:
        """Status, code and message for who may not come in."""
        given = self.asked.authorization
        if self.hub.gated:
            return 403 if given else 401, "GatedRepo", "Access to this dataset is restricted."
        if self.hub.token is None or given == f"Bearer {self.hub.token}":
            return None
        if given:
            return 401, "", "Invalid credentials in Authorization header"
        return 401, "RepoNotFound", "Invalid username or password."

    def _api(self, kind: str, repository: str, revision: str) -> None:
        commit = self._commit(kind, repository, revision)
        if commit:
            self._answer(200, {}, json.dumps({"id": repository, "sha": commit, "siblings": []}).encode())

    def _resolve(self, kind: str, repository: str, revision: str, file: str) -> None:
        commit = self._commit(kind, repository, revision)
        if not commit:
            return
        folder = self.hub.folder(kind, repository, commit)
        assert folder
        path = folder / unquote(file)
        place = f"{kind}/{repository}/{commit}/{file}"
        if not path.is_file():
            self._error(404, "EntryNotFound", "Entry not found", commit)
        elif path.suffix in self.hub.large:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            linked = {"X-Linked-Size": str(path.stat().st_size), "X-Linked-ETag": f'"{digest}"'}
            self._answer(302, {"Location": f"{self.hub.store}/store/{place}", "X-Repo-Commit": commit, **linked})
        else:
            self._answer(307, {"Location": f"/api/resolve-cache/{place}", "X-Repo-Commit": commit})

    def _commit(self, kind: str, repository: str, revision: str) -> str | None:
        commit = self.hub.commit(repository, unquote(revision))
        if not self.hub.folder(kind, repository):
            self._error(404 if self.asked.authorization else 401, "RepoNotFound", "Repository not found")
            return None
        if not commit:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {unquote(revision)}")
        return commit

    def _file(self, kind: str, repository: str, commit: str, file: str) -> None:
        folder = self.hub.folder(kind, repository, commit)
        assert folder
        path = folder / unquote(file)
        headers = {"Accept-Ranges": "bytes", "ETag": '"the-store-has-its-own"'}
        if self.path.startswith("/api"):
            headers |= {"ETag": f'"{git_digest(path.read_bytes())}"', "X-Repo-Commit": commit}
        trouble = self.hub.trouble(self.asked, with_status=False) or Trouble("")
        size, start = path.stat().st_size, 0
        if self.asked.range and not trouble.whole:
            start = int(self.asked.range.removeprefix("bytes=").removesuffix("-"))
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        if start >= size > 0:
            self._answer(416, {"Content-Range": f"bytes */{size}"})
            return
        self._begin(206 if "Content-Range" in headers else 200, {**headers, "Content-Length": str(size - start)})
        if self.command == "GET":
            self._bytes(path, start, trouble)

    def _bytes(self, path: Path, start: int, trouble: Trouble) -> None:
        left = (path.stat().st_size if trouble.cut_at is None else trouble.cut_at) - start
        self.close_connection = trouble.cut_at is not None
        with path.open("rb") as file:
            file.seek(start)
            while left > 0 and (chunk := file.read(min(_CHUNK, left))):
                time.sleep(trouble.pause)
                self.wfile.write(chunk.translate(_FLIPPED) if trouble.wrong else chunk)
                left -= len(chunk)

    def _error(self, status: int, code: str, message: str, commit: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message, "X-Repo-Commit": commit}
        self._answer(status, {name: text for name, text in headers.items() if text})

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
        self._begin(status, {**headers, "Content-Length": str(len(body))})
        if self.command == "GET":
            self.wfile.write(body)

    def _begin(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, text in headers.items():
            if self.command == "GET" or name not in self.hub.hidden:
                self.send_header(name, text)
        self.end_headers()
