"""Reports the senders of results that NVFlare cannot decode or that arrive incomplete.

By default NVFlare ends the server process, so a single site could end the job without being named.
"""

from collections.abc import Callable
from typing import Any

from nvflare.apis.fl_constant import ServerCommandNames
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.fuel.f3.cellnet import cell as cellnet
from nvflare.fuel.f3.cellnet.defs import CellChannel
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.streaming.stream_const import StreamHeaderKey
from nvflare.private.defs import CellMessageHeaderKeys

from fedsft_assets.federation.transport import TransferError

_decode = cellnet.decode_payload
# Local faults, not the sender's: NVFlare ends the process, and the job resumes in another.
_OWN_FAULTS = (MemoryError, OSError)


Tell = Callable[[Message, str], object]


def tell_of_unreadable_results(tell: Tell, tell_of_lost: Tell) -> None:
    """Install a hook that calls `tell` with each malformed result message and the reason.

    `tell_of_lost` is called for a result whose tensors cannot be fetched because the sender is gone. The message is
    then answered as if from an unknown client. Applies to all cells of this process.
    """

    def decode(message: Message, *args: Any, **kwargs: Any) -> None:
        try:
            _decode(message, *args, **kwargs)
        except _OWN_FAULTS:
            raise
        except Exception as error:
            if not _is_result(message):
                raise
            if isinstance(error, TransferError):
                _drop(message, str(error), tell_of_lost)
                return
            _drop(message, f"it cannot be decoded: {error}", tell)
            return
        if _is_result(message) and not _is_readable(message.payload):
            _drop(message, f"it is a {type(message.payload).__name__} without NVFlare's result headers", tell)

    cellnet.decode_payload = decode


def _is_result(message: Message) -> bool:
    asked = (message.get_header(StreamHeaderKey.CHANNEL), message.get_header(StreamHeaderKey.TOPIC))
    return asked == (CellChannel.SERVER_COMMAND, ServerCommandNames.SUBMIT_UPDATE)


def _is_readable(payload: object) -> bool:
    try:
        return isinstance(payload, Shareable) and isinstance(payload.get_peer_context(), FLContext)
    except (AttributeError, TypeError):  # its headers are not a dictionary
        return False


def _drop(message: Message, why: str, tell: Tell) -> None:
    tell(message, why)
    message.payload = Shareable()
    message.remove_header(CellMessageHeaderKeys.TOKEN)
