"""Sends a trainer's reports to the server's journal, in order, each until acknowledged."""

import json
import threading
import time
import uuid
from collections.abc import Callable
from queue import SimpleQueue

from fedsft_assets.federation.protocol.messages import PROGRESS_CHANNEL, PROGRESS_TOPIC
from fedsft_assets.federation.protocol.points import Point, points_to_data

# Sends a JSON message to the server; returns whether the server's journal has it.
Send = Callable[[str], bool]

_SECONDS_TO_ANSWER = 20.0
_LONGEST_PAUSE = 10.0


class Reporter:
    """Sends log lines with their metric points in a background thread.

    An unacknowledged message is sent again; the server recognizes duplicates by its id and the identities of its
    points. The first retry follows after `pause` seconds, each further one after twice as long.
    """

    def __init__(self, site: str, send: Send, pause: float = 0.5) -> None:
        self._site, self._send, self._pause = site, send, pause
        self._messages: SimpleQueue[str] = SimpleQueue()
        self._waiting = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="reporter", daemon=True).start()

    def report(self, text: str, points: list[Point]) -> None:
        """Print a line to the site's own log and queue it with its points. Never blocks."""
        print(f"{self._site} · {text}", flush=True)
        with self._changed:
            self._waiting += 1
        self._messages.put(json.dumps({"id": uuid.uuid4().hex, "text": text, "points": points_to_data(points)}))

    def flush(self, seconds: float | None = None) -> bool:
        """Wait up to `seconds` for the server's journal to have everything; returns whether it does."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, seconds)

    def _run(self) -> None:
        while True:
            message, pause = self._messages.get(), self._pause
            while not self._send(message):
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            with self._changed:
                self._waiting -= 1
                self._changed.notify_all()


def send_through_site(message: str) -> bool:
    """Send a message through the site's job process to the server; returns whether it was acknowledged."""
    from nvflare.client.api import get_context
    from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
    from nvflare.fuel.f3.message import Message

    api = get_context().api
    try:
        reply = api._cell.core_cell.send_request(
            PROGRESS_CHANNEL,
            PROGRESS_TOPIC,
            api._cj_fqcn,
            Message(payload=message),
            timeout=_SECONDS_TO_ANSWER,
            optional=True,
        )
    except Exception as error:  # NVFlare may raise anything during reconnects
        print(f"sending to the server failed: {error}", flush=True)
        return False
    return bool(reply.get_header(MessageHeaderKey.RETURN_CODE) == ReturnCode.OK)
