"""What a supervisor says is what its starter hears."""

import pytest

from fedsft_assets.federation.protocol.events import Event, Failed, decode, encode
from fedsft_assets.federation.protocol.journal import Missed, Progress
from fedsft_assets.federation.protocol.points import Point
from fedsft_assets_tests.federation.protocol.test_job_report import REPORT

EVENTS: list[Event] = [
    Progress("site-1 · val_loss 7.1783 after 0 of 8 rounds"),
    Point("val_loss", 7.178342342, 0, 0),
    Point("train_loss", 2.5, 1, 16, "site-1", 3, 99),
    Missed("site-2", 3, "its trainer failed", "Traceback:\n\tValueError: é"),
    Missed("site-2", 4, "it is not connected"),
    REPORT,
    Failed("FLARE job 7 ended early", retryable=True),
    Failed('the trainer failed:\nTraceback\n\t"é" \\ end'),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_event_is_the_same_after_a_trip_through_its_line(event: Event) -> None:
    line = encode(event)
    assert len(line.splitlines()) == 1
    assert decode(line) == event
    assert decode(line + "\n") == event


@pytest.mark.parametrize("line", ["", "Traceback (most recent call last):\n", "{", "3", '{"x": 1}', '{"event": "x"}'])
def test_line_that_is_no_event_is_an_error(line: str) -> None:
    with pytest.raises(ValueError, match=r"Expecting|expected an event"):
        decode(line)
