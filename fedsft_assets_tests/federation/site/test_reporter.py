"""A trainer's reports: all arrive, in their order, however often the server does not answer."""

import json
import threading
from collections.abc import Iterable

import pytest

from fedsft_assets.federation.protocol.points import Point
from fedsft_assets.federation.site.reporter import Reporter


class _Server:
    """Gives these answers, and then takes everything."""

    def __init__(self, answers: Iterable[bool] = ()) -> None:
        self.answers = iter(answers)
        self.got: list[str] = []
        self.asked = threading.Event()
        self.open = threading.Event()
        self.open.set()

    def __call__(self, message: str) -> bool:
        self.asked.set()
        self.open.wait(30)
        self.got.append(message)
        return next(self.answers, True)


def test_messages_arrive_in_their_order_with_their_points(capsys: pytest.CaptureFixture[str]) -> None:
    server = _Server()
    reports = Reporter("site-1", server, pause=0.001)
    reports.report("begins", [])
    reports.report("val_loss 2.0", [Point("val_loss", 2.0, 1, 16, "site-1", tokens=9, time=1.5)])
    assert reports.flush(30)
    first, second = map(json.loads, server.got)
    assert (first["text"], first["points"], second["text"]) == ("begins", [], "val_loss 2.0")
    expected = {"name": "val_loss", "value": 2.0, "round": 1, "samples": 16, "step": None, "tokens": 9, "time": 1.5}
    assert second["points"] == [expected]
    assert first["id"] != second["id"]
    assert capsys.readouterr().out == "site-1 · begins\nsite-1 · val_loss 2.0\n"


def test_message_without_an_answer_is_sent_again_as_it_was_before_the_next_one() -> None:
    server = _Server([False, False, True, False, True])
    reports = Reporter("site-1", server, pause=0.001)
    reports.report("one", [])
    reports.report("two", [])
    assert reports.flush(30)
    assert [json.loads(message)["text"] for message in server.got] == ["one", "one", "one", "two", "two"]
    assert len(set(server.got)) == 2


def test_reporting_does_not_wait_for_the_server_and_flushing_does() -> None:
    server = _Server()
    server.open.clear()
    reports = Reporter("site-1", server, pause=0.001)
    reports.report("one", [])
    assert server.asked.wait(30)
    reports.report("two", [])
    assert not reports.flush(0.01)
    server.open.set()
    assert reports.flush(30)
    assert len(server.got) == 2
