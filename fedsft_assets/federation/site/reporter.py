"""What a trainer reports on its way to the server's journal: one message after the other, each until it is there."""

import json
import threading
import time
import uuid
from collections.abc import Callable
from queue import SimpleQueue

from fedsft_assets.federation.protocol.messages import PROGRESS_CHANNEL, PROGRESS_TOPIC
from fedsft_assets.federation.protocol.points import Point, points_to_data

# Hands a message in JSON to the server; whether the server's journal has it.
Send = Callable[[str], bool]

_SECONDS_TO_ANSWER = 20.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 10.0  # seconds before a message is sent again


class Reporter:
    """Sends lines of text, and the points that they stand for, in a thread of its own.

    A message that the server does not acknowledge is sent again; its id and the identities of its points tell the
    server that it is the same one.
    """

    def __init__(self, site: str, send: Send) -> None:
        self._site, self._send = site, send
        self._messages: SimpleQueue[str] = SimpleQueue()
        self._waiting = 0
        self._changed = threading.Condition()
        threading.Thread(target=self._run, name="reporter", daemon=True).start()

    def report(self, text: str, points: list[Point]) -> None:
        """Print a line for the site's own log, and have it sent with its points. Never waits."""
        print(f"{self._site} · {text}", flush=True)
        with self._changed:
            self._waiting += 1
        self._messages.put(json.dumps({"id": uuid.uuid4().hex, "text": text, "points": points_to_data(points)}))

    def flush(self, seconds: float | None = None) -> bool:
        """Wait until the server's journal has all, so many seconds at most; whether it has."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, seconds)

    def _run(self) -> None:
        while True:
            message, pause = self._messages.get(), _FIRST_PAUSE
            while not self._send(message):
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
            with self._changed:
                self._waiting -= 1
                self._changed.notify_all()


def send_through_site(message: str) -> bool:
    """Hand a message to the site's part of the job, which hands it to the server's and brings its answer back."""
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
    except Exception as error:  # NVFlare raises what it likes while connections come and go
        print(f"the server could not be told: {error}", flush=True)
        return False
    return bool(reply.get_header(MessageHeaderKey.RETURN_CODE) == ReturnCode.OK)
