"""Access control for a web interface on loopback: requests need its token and must come from its own pages.

Every account of this machine can reach a port on loopback, and so can every web page in a local browser. Their requests
never reach the application behind the guard.
"""

import hmac
import json
import secrets
import socket
import sys
from pathlib import Path

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocketClose

NO_TOKEN = (
    "This page requires its token: open the full link that `make ui`, `make tensorboard` or `fedsft ui` printed"
    " when it started.\n"
)
FOREIGN = "This page only accepts browsers on this machine, at the address of its link, and no other pages.\n"
_ESTABLISHED = "01"  # connection state in /proc/net/tcp


def guarded(app: ASGIApp, token: str, port: int) -> ASGIApp:
    """Wrap the application: requests without the token get a constant text with status 401 or 403.

    The token is passed once as `?token=…`, which is replaced by a cookie and removed from the address, or as
    `Authorization: Bearer …` with every request. The cookie differs from the token: it expires with this process, and
    is useless to other accounts, which may see it because browsers send cookies to all ports of a host.

    `Host` must be 127.0.0.1 or localhost with this port, which prevents DNS rebinding. Pages of other origins may link
    here, but not make requests.
    """
    return _Guard(app, token, port)


class _Guard:
    def __init__(self, app: ASGIApp, token: str, port: int) -> None:
        self._app = app
        self._token = token
        self._hosts = (f"127.0.0.1:{port}", f"localhost:{port}")
        self._cookie = f"fedsft_{port}"
        self._key = secrets.token_bytes(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._answer(HTTPConnection(scope)) if scope["type"] in ("http", "websocket") else None
        if answer is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket" and "websocket.http.response" not in scope.get("extensions", {}):
            await WebSocketClose(code=1008)(scope, receive, send)
        else:
            await answer(scope, receive, send)

    def _answer(self, asked: HTTPConnection) -> Response | None:
        """The response to a rejected or redirected request; None to pass it on to the application."""
        if not self._is_own(asked.headers) or _is_of_another_page(asked):
            return PlainTextResponse(FOREIGN, 403, headers={"Cache-Control": "no-store"})
        if self._has_token(asked):
            return None
        if asked.scope.get("method") in ("GET", "HEAD") and self._is_token(asked.query_params.get("token", "")):
            redirect = _redirect(_without_token(asked.scope), asked.headers)
            redirect.set_cookie(self._cookie, self._session(asked.scope), httponly=True, samesite="strict")
            return redirect
        if self._has_session(asked):
            return None
        return PlainTextResponse(NO_TOKEN, 401, headers={"Cache-Control": "no-store", "WWW-Authenticate": "Bearer"})

    def _is_own(self, headers: Headers) -> bool:
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        return len(hosts) == 1 and hosts[0] in self._hosts and all(origin == f"http://{hosts[0]}" for origin in origins)

    def _has_token(self, asked: HTTPConnection) -> bool:
        scheme, _, given = asked.headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and self._is_token(given)

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self._token.encode())

    def _has_session(self, asked: HTTPConnection) -> bool:
        given = asked.cookies.get(self._cookie, "")
        return secrets.compare_digest(given.encode(), self._session(asked.scope).encode())

    def _session(self, scope: Scope) -> str:
        return hmac.digest(self._key, str(_account(scope)).encode(), "sha256").hex()


def _is_of_another_page(asked: HTTPConnection) -> bool:
    """Whether the browser reports a request from a page of another origin, including other ports of this machine.

    Following a link does not count: cross-site, browsers send no cookie with it, and the other page cannot read the
    result.
    """
    header = asked.headers.get
    is_link = asked.scope.get("method") == "GET" and header("sec-fetch-dest") == "document"
    return header("sec-fetch-site", "none") not in ("same-origin", "none") and not is_link


def _redirect(path: str, headers: Headers) -> Response:
    """A redirect; for a cross-site link a page that navigates, since strict cookies are only sent same-site."""
    if headers.get("sec-fetch-site") != "cross-site":
        return RedirectResponse(path, 303, headers={"Cache-Control": "no-store"})
    quoted = json.dumps(path).replace("<", "\\u003c")
    return HTMLResponse(
        f"<script>location.replace({quoted} + location.hash)</script>", headers={"Cache-Control": "no-store"}
    )


def _without_token(scope: Scope) -> str:
    """The request's path and query without the token."""
    path = scope.get("raw_path") or scope["path"].encode()
    kept = [part for part in scope["query_string"].split(b"&") if part and not part.startswith(b"token=")]
    # A leading `//` would be parsed as another host.
    return b"?".join([b"/" + path.lstrip(b"/"), *([b"&".join(kept)] if kept else [])]).decode("latin-1")


def _account(scope: Scope) -> int | None:
    """User id of the process at the other end of the connection, on Linux; None if unknown."""
    try:
        ends = [_as_listed(*scope["client"]), _as_listed(*scope["server"])]
        tables = [path.read_text() for path in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")) if path.exists()]
    except (OSError, TypeError):
        return None
    for row in "\n".join(tables).splitlines():
        _, local, remote, state, *more = row.split()
        # The owner of a socket already closed by its process is unknown.
        if state == _ESTABLISHED and local.endswith(ends[0]) and remote.endswith(ends[1]):
            return int(more[3])
    return None


def _as_listed(host: str, port: int) -> str:
    """The address in the format of /proc/net/tcp; a suffix of it for IPv4-mapped IPv6."""
    return f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{port:04X}"
