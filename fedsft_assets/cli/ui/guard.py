"""Who may use a user interface on loopback: whoever has its token, from pages of its own, and nobody else.

Every account of this machine can reach a port on loopback, and so can every web page in a browser here. Nothing of what
they ask gets to the application behind this.
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
    "This page is for whoever has its token: open the whole link that `make ui`, `make tensorboard` or `fedsft ui`"
    " printed when it started.\n"
)
FOREIGN = "This page is only for browsers on this machine, at the address of its link, and not for other pages.\n"
_ESTABLISHED = "01"  # of the states of a connection in /proc/net/tcp


def guarded(app: ASGIApp, token: str, port: int) -> ASGIApp:
    """The application, for whoever has the token; others get one of two constant texts, with 401 or 403.

    The token comes as `?token=…` once, and goes on as a cookie and out of the address, or as `Authorization: Bearer …`
    with every request. The cookie is no token: it dies with this process, and opens nothing to another account, which
    may be shown it, because browsers send cookies to all ports of a host.

    `Host` is 127.0.0.1 or localhost with this port, which it is not where a foreign name was made to lead here. Pages
    of other origins may lead here, but not ask for anything.
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
        """What to say in place of the application, if anything."""
        if not self._is_own(asked.headers) or _is_of_another_page(asked):
            return PlainTextResponse(FOREIGN, 403, headers={"Cache-Control": "no-store"})
        if self._has_token(asked):
            return None
        if asked.scope.get("method") in ("GET", "HEAD") and self._is_token(asked.query_params.get("token", "")):
            there = _leading(_without_token(asked.scope), asked.headers)
            there.set_cookie(self._cookie, self._session(asked.scope), httponly=True, samesite="strict")
            return there
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
    """Whether a browser says that a page of another origin asks, be it one of this machine.

    A link to a page here is none: from other sites browsers send no cookie with it, and none shows what comes back.
    """
    said = asked.headers.get
    is_link = asked.scope.get("method") == "GET" and said("sec-fetch-dest") == "document"
    return said("sec-fetch-site", "none") not in ("same-origin", "none") and not is_link


def _leading(path: str, headers: Headers) -> Response:
    """A redirect, or where the link was on a page of another site, a page: a strict cookie is only sent from here."""
    if headers.get("sec-fetch-site") != "cross-site":
        return RedirectResponse(path, 303, headers={"Cache-Control": "no-store"})
    quoted = json.dumps(path).replace("<", "\\u003c")
    return HTMLResponse(
        f"<script>location.replace({quoted} + location.hash)</script>", headers={"Cache-Control": "no-store"}
    )


def _without_token(scope: Scope) -> str:
    """The address on this server without the token in it."""
    path = scope.get("raw_path") or scope["path"].encode()
    kept = [part for part in scope["query_string"].split(b"&") if part and not part.startswith(b"token=")]
    # Two slashes would begin the name of another server.
    return b"?".join([b"/" + path.lstrip(b"/"), *([b"&".join(kept)] if kept else [])]).decode("latin-1")


def _account(scope: Scope) -> int | None:
    """Whose process is at the other end of the connection, as Linux says; None where that cannot be known."""
    try:
        ends = [_as_listed(*scope["client"]), _as_listed(*scope["server"])]
        tables = [path.read_text() for path in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")) if path.exists()]
    except (OSError, TypeError):
        return None
    for row in "\n".join(tables).splitlines():
        _, local, remote, state, *more = row.split()
        # Of a socket that its process has closed already, nobody says whose it was.
        if state == _ESTABLISHED and local.endswith(ends[0]) and remote.endswith(ends[1]):
            return int(more[3])
    return None


def _as_listed(host: str, port: int) -> str:
    """As /proc/net has an address; the end of it where the old protocol is used through the new one."""
    return f"{int.from_bytes(socket.inet_aton(host), sys.byteorder):08X}:{port:04X}"
