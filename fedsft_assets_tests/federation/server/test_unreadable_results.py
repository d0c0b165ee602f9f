"""What NVFlare raises while it reads a result: the one who sent it is named, and the server's process lives on."""

from typing import Any

import pytest
from nvflare.apis.fl_constant import ServerCommandNames
from nvflare.apis.shareable import Shareable
from nvflare.fuel.f3.cellnet import cell as cellnet
from nvflare.fuel.f3.cellnet.defs import CellChannel
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.streaming.stream_const import StreamHeaderKey
from nvflare.private.defs import CellMessageHeaderKeys

from fedsft_assets.federation.server.unreadable_results import tell_of_unreadable_results
from fedsft_assets.federation.transport import TransferError


class _Payload:
    """A payload that NVFlare cannot decode."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __len__(self) -> int:
        raise self._error


@pytest.fixture(autouse=True)
def _decoding_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cellnet, "decode_payload", cellnet.decode_payload)


def _result(error: Exception) -> Message:
    headers = {
        StreamHeaderKey.CHANNEL: CellChannel.SERVER_COMMAND,
        StreamHeaderKey.TOPIC: ServerCommandNames.SUBMIT_UPDATE,
        CellMessageHeaderKeys.TOKEN: "of site-1",
    }
    return Message(headers, _Payload(error))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("Type 'x' is not registered"), ("unreadable", "it cannot be decoded: Type 'x' is not registered")),
        (TransferError("producer error after 3 secs"), ("lost", "producer error after 3 secs")),
    ],
)
def test_sender_of_a_result_is_told_of_and_it_is_answered_as_nobodys(
    error: Exception, expected: tuple[str, str]
) -> None:
    told: list[tuple[str, str, str]] = []

    def tell(kind: str) -> Any:
        return lambda message, why: told.append((kind, message.get_header(CellMessageHeaderKeys.TOKEN), why))

    tell_of_unreadable_results(tell("unreadable"), tell("lost"))
    message = _result(error)
    cellnet.decode_payload(message)
    assert told == [(expected[0], "of site-1", expected[1])]
    assert isinstance(message.payload, Shareable)
    assert message.get_header(CellMessageHeaderKeys.TOKEN) is None


@pytest.mark.parametrize("error", [OSError("no space left"), MemoryError()])
def test_what_this_machine_lacks_is_nobodys_fault(error: Exception) -> None:
    told: list[object] = []
    tell_of_unreadable_results(lambda *said: told.append(said), lambda *said: told.append(said))
    with pytest.raises(type(error)):
        cellnet.decode_payload(_result(error))
    assert told == []


def test_other_messages_are_none_of_its_business() -> None:
    told: list[object] = []
    tell_of_unreadable_results(lambda *said: told.append(said), lambda *said: told.append(said))
    with pytest.raises(TransferError):
        cellnet.decode_payload(Message({}, _Payload(TransferError("gone"))))
    assert told == []
