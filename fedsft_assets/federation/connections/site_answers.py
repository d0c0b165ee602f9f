"""Restricts the requests that a site's cells answer to those that jobs need, from the server or the site itself.

NVFlare's cells answer anyone who can connect, and the request itself says whether it needs authorization: a shell
command that says no is run at once. Here every request that is not listed below is refused and logged, whoever sends
it.
"""

import logging
from typing import Any

from nvflare.client.cell.defs import CHANNEL as CLIENT_API
from nvflare.fuel.f3.cellnet.defs import CellChannelTopic, MessageHeaderKey, ReturnCode
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.cellnet.utils import make_reply
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.streaming.download_service import OBJ_DOWNLOADER_CHANNEL
from nvflare.fuel.f3.streaming.stream_const import STREAM_CHANNEL, StreamHeaderKey
from nvflare.fuel.hci.proto import ReplyKeyword
from nvflare.private.admin_defs import error_reply
from nvflare.private.defs import CellChannel, RequestHeader, SysCommandTopic, TrainingTopic, new_cell_message

from fedsft_assets.federation.protocol.messages import PROGRESS_CHANNEL, PROGRESS_TOPIC

_ALL, _BULK = "*", "bulk"
# The topics of each channel. A streamed request has its own channel inside.
_ANSWERED: dict[str, tuple[str, ...]] = {
    CellChannel.CLIENT_MAIN: (_ALL,),  # if `_refuse_command` accepts it
    CellChannel.CLIENT_COMMAND: (_ALL,),  # from a site's process to that of a job, which runs no shell commands
    CellChannel.AUX_COMMUNICATION: (_ALL,),  # between the parts of a job
    CellChannel.RETURN_ONLY: (_ALL,),  # replies to the site's requests
    CellChannel.CELLNET: (_BULK, CellChannelTopic.Bye),
    CLIENT_API: (_ALL,),  # from a trainer
    PROGRESS_CHANNEL: (PROGRESS_TOPIC,),  # likewise
    OBJ_DOWNLOADER_CHANNEL: (_ALL,),  # downloads that the site offers
    STREAM_CHANNEL: (_ALL,),
    "credential_manager": ("key_exchange",),
    "_net_manager": ("peers",),  # used to check whether the site runs its part of a job
}
# Commands of the server itself, for jobs that the site has authorized.
_SERVER_COMMANDS = {
    TrainingTopic.START,
    TrainingTopic.START_JOB,
    TrainingTopic.ABORT,
    TrainingTopic.ABORT_TASK,
    TrainingTopic.DELETE_RUN,
    TrainingTopic.CHECK_RESOURCE,
    TrainingTopic.CANCEL_RESOURCE,
}
# Commands of users, which the site's own policy must authorize.
_USER_COMMANDS = {TrainingTopic.DEPLOY, TrainingTopic.CHECK_STATUS, SysCommandTopic.REPORT_VERSION}
_OWN_JOB_COMMANDS = {TrainingTopic.NOTIFY_JOB_STATUS}

_logger = logging.getLogger(__name__)


def answer_only_what_jobs_need(cell: Any) -> None:
    """Make a site's cell, NVFlare's `CoreCell`, refuse every other request from now on."""
    cell.set_message_interceptor(_refuse_message, cell.get_fqcn())
    cell.add_incoming_request_filter(CellChannel.CLIENT_MAIN, _ALL, _refuse_command, cell.get_fqcn())
    cell.add_incoming_request_filter(CellChannel.CELLNET, _BULK, _refuse_bulk)


def _refuse_message(message: Message, own: str) -> Message | None:
    """The refusal of a request by its headers, before its payload is read; None if it is accepted."""
    if message.get_header(MessageHeaderKey.DESTINATION) != own:
        return None  # to be forwarded
    channel, topic = (str(message.get_header(key, "")) for key in (MessageHeaderKey.CHANNEL, MessageHeaderKey.TOPIC))
    if channel == STREAM_CHANNEL and message.get_header(StreamHeaderKey.CHANNEL):
        channel = str(message.get_header(StreamHeaderKey.CHANNEL))
        topic = str(message.get_header(StreamHeaderKey.TOPIC, ""))
    if _is_answered(channel, topic) and _is_own_or_server(_origin(message), own):
        return None
    return make_reply(ReturnCode.UNAUTHENTICATED, _refusal(message, f"topic {topic!r} of channel {channel!r}"))


def _refuse_command(message: Message, site: str) -> Message | None:
    """The refusal of an admin command; None if it is accepted."""
    command, origin = message.payload, _origin(message)
    topic = str(getattr(command, "topic", ""))
    if origin == FQCN.ROOT_SERVER:
        needs_authorization = command.get_header(RequestHeader.REQUIRE_AUTHZ) == "true"
        allowed = topic in _SERVER_COMMANDS or (topic in _USER_COMMANDS and needs_authorization)
    else:
        allowed = topic in _OWN_JOB_COMMANDS and origin.startswith(f"{site}.")
    return None if allowed else new_cell_message({}, error_reply(_refusal(message, f"command {topic!r}")))


def _refuse_bulk(message: Message) -> Message | None:
    """The refusal of a bulk message, whose parts NVFlare would process unchecked; None if all are accepted."""
    for part in message.payload:
        channel, topic = str(part.get("channel")), str(part.get("topic"))
        if not _is_answered(channel, topic):
            return make_reply(ReturnCode.UNAUTHENTICATED, _refusal(message, f"topic {topic!r} of channel {channel!r}"))
    return None


def _is_answered(channel: str, topic: str) -> bool:
    topics = _ANSWERED.get(channel, ())
    return _ALL in topics or topic in topics


def _is_own_or_server(origin: str, own: str) -> bool:
    """Whether a cell belongs to the server, to a job at the server, or to the same site."""
    return origin.partition(".")[0] in (FQCN.ROOT_SERVER, own.partition(".")[0])


def _origin(message: Message) -> str:
    return str(message.get_header(MessageHeaderKey.ORIGIN, ""))


def _refusal(message: Message, request: str) -> str:
    not_authorized = ReplyKeyword.NOT_AUTHORIZED  # the wording that NVFlare's clients recognize
    refusal = f"{request} from {_origin(message)!r} is {not_authorized}: this site answers only what jobs need"
    _logger.warning(refusal)
    return refusal
