"""Who gets past the guard of the user interfaces, and what everybody else gets."""

import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.websockets import WebSocket

from fedsft_assets.cli.ui.guard import FOREIGN, NO_TOKEN, guarded
from fedsft_assets_tests.other_account import as_another_account, needs_another_account

TOKEN = "a-token-of-this-test_3141"
BEARER = {"Authorization": f"Bearer {TOKEN}"}
PORT = 3000
TALK = f"ws://127.0.0.1:{PORT}/talk"


async def _page(request: Request) -> PlainTextResponse:
    return PlainTextResponse(
        f"{request.method} {request.url.path}?{request.url.query} {(await request.body()).decode()}"
    )


async def _talk(socket: WebSocket) -> None:
    await socket.accept()
    await socket.send_text(f"heard {await socket.receive_text()}")


def _app(port: int = PORT) -> Starlette:
    methods = ["GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE"]
    inner = Starlette(routes=[WebSocketRoute("/talk", _talk), Route("/{path:path}", _page, methods=methods)])
    return guarded(inner, TOKEN, port)  # type: ignore[return-value]


@pytest.fixture
def browser() -> TestClient:
    """Without the token at first; it keeps cookies and does not follow redirects."""
    return TestClient(_app(), base_url=f"http://127.0.0.1:{PORT}", follow_redirects=False)


@pytest.fixture
def known(browser: TestClient) -> TestClient:
    """A browser in which the link was opened."""
    browser.get(f"/?token={TOKEN}")
    return browser


@pytest.mark.parametrize("path", ["/", "/graphql", "/graphql?query={version}", "/?token=", "/?token=wrong", "/health"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_is_answered_without_the_token(browser: TestClient, method: str, path: str) -> None:
    answer = browser.request(method, path)
    assert answer.status_code == 401
    assert answer.text == (NO_TOKEN if method != "HEAD" else "")
    assert "set-cookie" not in answer.headers
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer wrong"},
        {"Authorization": TOKEN},
        {"Authorization": f"Basic {TOKEN}"},
        {"Authorization": "Bearer"},
        {"Authorization": b"Bearer \xff\xfe"},
        {"Cookie": f"fedsft_{PORT}={TOKEN}"},  # a cookie is another secret
        {"Cookie": f"fedsft_{PORT}="},
        {"Cookie": f"token={TOKEN}"},
        {"X-Forwarded-For": "127.0.0.1"},
    ],
)
def test_what_is_no_token_opens_nothing(browser: TestClient, headers: dict[str, str]) -> None:
    assert browser.get("/", headers=headers).text == NO_TOKEN


def test_link_gives_a_cookie_once_and_takes_the_token_out_of_the_address(browser: TestClient) -> None:
    answer = browser.get(f"/asset-groups/~all?a=b%20c&token={TOKEN}&d=")
    assert answer.status_code == 303
    assert answer.headers["location"] == "/asset-groups/~all?a=b%20c&d="
    assert answer.headers["cache-control"] == "no-store"
    name, value, *rules = re.split("[=;] ?", answer.headers["set-cookie"])
    assert name == f"fedsft_{PORT}"
    assert TOKEN not in value
    assert len(value) >= 32
    assert {rule.lower() for rule in rules} == {"httponly", "samesite", "strict", "path", "/"}
    assert browser.get(answer.headers["location"]).text == "GET /asset-groups/~all?a=b%20c&d= "


@pytest.mark.parametrize(
    ("asked", "answered"), [("//evil.example/x", "/evil.example/x"), ("/%2F/x", "/%2F/x"), ("/a?", "/a")]
)
def test_link_leads_nowhere_else(browser: TestClient, asked: str, answered: str) -> None:
    mark = "" if asked.endswith("?") else "?"
    answer = browser.get(f"http://127.0.0.1:{PORT}{asked}{mark}token={TOKEN}")
    assert answer.headers["location"] == answered


def test_link_on_a_page_of_another_site_leads_on_from_a_page_here(browser: TestClient) -> None:
    """There, a browser would not send the new cookie along with a redirect."""
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    answer = browser.get(f"/</script>?token={TOKEN}&a=%22", headers=headers)
    assert answer.text == '<script>location.replace("/%3C/script%3E?a=%22" + location.hash)</script>'
    assert answer.status_code == 200
    assert browser.get("/").status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_whoever_has_the_token_gets_everything(host: str, method: str) -> None:
    address = f"http://{host}:{PORT}"
    browser = TestClient(_app(), base_url=address, follow_redirects=False)
    content = b"hello" if method == "POST" else None
    expected = f"{method} /graphql?a=b {'hello' if content else ''}"
    assert browser.request(method, "/graphql?a=b", content=content, headers=BEARER).text == expected
    browser.get(f"/?token={TOKEN}")
    assert browser.request(method, "/graphql?a=b", content=content, headers={"Origin": address}).text == expected


def test_a_cookie_ends_with_the_process_and_is_for_one_port(known: TestClient) -> None:
    assert known.get("/").status_code == 200
    for port in (PORT, PORT + 1):
        later = TestClient(_app(port), base_url=f"http://127.0.0.1:{port}", cookies=dict(known.cookies))
        assert later.get("/").text == NO_TOKEN


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:3000",
        "127.0.0.1",
        "127.0.0.1:3001",
        "127.0.0.2:3000",
        "localhost:30000",
        "[::1]:3000",
        "127.0.0.1:3000.evil.example",
        "127.0.0.1:3000@evil.example",
        "",
    ],
)
def test_foreign_names_of_this_machine_are_refused_also_with_the_token(known: TestClient, host: str) -> None:
    for headers in ({}, BEARER):
        answer = known.get(f"/?token={TOKEN}", headers={"Host": host, **headers})
        assert (answer.status_code, answer.text) == (403, FOREIGN)


@pytest.mark.parametrize(
    "origin",
    [
        "http://evil.example",
        "http://127.0.0.1:3001",
        "http://localhost:3000",
        "https://127.0.0.1:3000",
        "http://127.0.0.1",
        "http://127.0.0.1:3000.evil.example",
        "null",
        "",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_pages_of_other_origins_are_refused_also_with_the_token(known: TestClient, method: str, origin: str) -> None:
    for headers in ({}, BEARER):
        answer = known.request(method, "/graphql", headers={"Origin": origin, **headers})
        assert (answer.status_code, answer.text) == (403, FOREIGN)


def test_two_hosts_or_origins_are_none(known: TestClient) -> None:
    own = f"127.0.0.1:{PORT}"
    assert known.get("/", headers=[("Origin", f"http://{own}"), ("Origin", "http://evil.example")]).status_code == 403
    assert known.get("/", headers=[("Host", own), ("Host", "evil.example")]).status_code == 403


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_pages_elsewhere_may_lead_here_and_not_ask(known: TestClient, site: str) -> None:
    """An image or a form of another local port comes without an Origin or with the cookie, or both."""
    asked = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
    framed = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}
    led = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert known.get("/graphql", headers=asked).status_code == 403
    assert known.get("/", headers=framed).status_code == 403
    assert known.post("/graphql", headers=led).status_code == 403
    assert known.get("/", headers=led).status_code == 200
    for site_of_its_own in ("same-origin", "none"):
        assert known.get("/graphql", headers={**asked, "Sec-Fetch-Site": site_of_its_own}).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({**BEARER, "Origin": "http://evil.example"}, 403),
        ({**BEARER, "Host": "evil.example"}, 403),
    ],
)
def test_websockets_are_refused_alike(browser: TestClient, headers: dict[str, str], status: int) -> None:
    with pytest.raises(WebSocketDenialResponse) as refused, browser.websocket_connect(TALK, headers=headers):
        pass
    assert refused.value.status_code == status
    assert refused.value.text in (NO_TOKEN, FOREIGN)


def test_websockets_open_with_the_token_or_the_cookie(browser: TestClient) -> None:
    for headers in (BEARER, {"Origin": f"http://127.0.0.1:{PORT}"}):
        with browser.websocket_connect(TALK, headers=headers) as socket:
            socket.send_text("hello")
            assert socket.receive_text() == "heard hello"
        browser.get(f"/?token={TOKEN}")


@contextmanager
def _served() -> Iterator[int]:
    listener = uvicorn.Config(_app(), host="127.0.0.1", port=0).bind_socket()
    port = int(listener.getsockname()[1])
    server = uvicorn.Server(uvicorn.Config(_app(port), log_level="warning", access_log=False, proxy_headers=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield port
    finally:
        server.should_exit = True
        thread.join()


_ASK = """
import sys, urllib.error, urllib.request
request = urllib.request.Request(sys.argv[1], headers=dict(zip(sys.argv[2::2], sys.argv[3::2])))
try:
    print(urllib.request.urlopen(request).status)
except urllib.error.HTTPError as error:
    print(error.code)
"""


@needs_another_account
def test_a_cookie_opens_nothing_to_another_account() -> None:
    """Browsers send cookies to all ports of a host, so whoever listens on one can get them."""

    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: object) -> None:
            return None

    with _served() as port:
        address = f"http://127.0.0.1:{port}/"
        with pytest.raises(urllib.error.HTTPError) as led:
            urllib.request.build_opener(Stay).open(f"{address}?token={TOKEN}")
        cookie = led.value.headers["Set-Cookie"].split(";")[0]
        with urllib.request.urlopen(urllib.request.Request(address, headers={"Cookie": cookie})) as own:
            assert own.status == 200
        for headers, status in (
            (["Cookie", cookie], "401"),
            (["Cookie", cookie, "X-Forwarded-For", "127.0.0.1"], "401"),
            (["Authorization", f"Bearer {TOKEN}"], "200"),
        ):
            assert as_another_account(_ASK, address, *headers) == status, headers
