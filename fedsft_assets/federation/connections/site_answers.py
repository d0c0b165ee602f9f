"""What a site answers on NVFlare's cells: what a job and its life need, asked by its server or by its own processes.

NVFlare's cells answer whoever reaches them, and whether a right is needed is what the question itself says: a shell
command runs at once if it says no. Here everything that is not named below is refused, whoever asks, with a line in the
site's log.
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
# By channel, the topics. What is streamed has its own channel inside.
_ANSWERED: dict[str, tuple[str, ...]] = {
    CellChannel.CLIENT_MAIN: (_ALL,),  # what `_refuse_command` lets through
    CellChannel.CLIENT_COMMAND: (_ALL,),  # a site's own process to that of a job, which runs no shell
    CellChannel.AUX_COMMUNICATION: (_ALL,),  # of the parts of a job to one another
    CellChannel.RETURN_ONLY: (_ALL,),  # answers to what the site has asked
    CellChannel.CELLNET: (_BULK, CellChannelTopic.Bye),
    CLIENT_API: (_ALL,),  # of a trainer
    PROGRESS_CHANNEL: (PROGRESS_TOPIC,),  # the same
    OBJ_DOWNLOADER_CHANNEL: (_ALL,),  # what the site has offered
    STREAM_CHANNEL: (_ALL,),
    "credential_manager": ("key_exchange",),
    "_net_manager": ("peers",),  # the study asks whether a site runs its part of a job
}
# Commands that the server hands on: of its own, for jobs that it has been allowed to run.
_OF_A_JOB = {
    TrainingTopic.START,
    TrainingTopic.START_JOB,
    TrainingTopic.ABORT,
    TrainingTopic.ABORT_TASK,
    TrainingTopic.DELETE_RUN,
    TrainingTopic.CHECK_RESOURCE,
    TrainingTopic.CANCEL_RESOURCE,
}
# And of users, for which the site's own list of rights is asked.
_OF_A_USER = {TrainingTopic.DEPLOY, TrainingTopic.CHECK_STATUS, SysCommandTopic.REPORT_VERSION}
_OF_OWN_JOBS = {TrainingTopic.NOTIFY_JOB_STATUS}

_logger = logging.getLogger(__name__)


def answer_only_what_jobs_need(cell: Any) -> None:
    """Have a site's cell, NVFlare's `CoreCell`, refuse everything else from now on."""
    cell.set_message_interceptor(_refuse_message, cell.get_fqcn())
    cell.add_incoming_request_filter(CellChannel.CLIENT_MAIN, _ALL, _refuse_command, cell.get_fqcn())
    cell.add_incoming_request_filter(CellChannel.CELLNET, _BULK, _refuse_bulk)


def _refuse_message(message: Message, own: str) -> Message | None:
    """The refusal of a request, before anything of it is read but its headers; None if it goes on."""
    if message.get_header(MessageHeaderKey.DESTINATION) != own:
        return None  # it is handed on
    channel, topic = (str(message.get_header(key, "")) for key in (MessageHeaderKey.CHANNEL, MessageHeaderKey.TOPIC))
    if channel == STREAM_CHANNEL and message.get_header(StreamHeaderKey.CHANNEL):
        channel = str(message.get_header(StreamHeaderKey.CHANNEL))
        topic = str(message.get_header(StreamHeaderKey.TOPIC, ""))
    if _is_answered(channel, topic) and _is_near(_origin(message), own):
        return None
    return make_reply(ReturnCode.UNAUTHENTICATED, _said(message, f"{topic!r} of channel {channel!r}"))


def _refuse_command(message: Message, site: str) -> Message | None:
    """The refusal of an administrator's command; None if it goes on."""
    command, origin = message.payload, _origin(message)
    topic = str(getattr(command, "topic", ""))
    if origin == FQCN.ROOT_SERVER:
        asks_for_right = command.get_header(RequestHeader.REQUIRE_AUTHZ) == "true"
        allowed = topic in _OF_A_JOB or (topic in _OF_A_USER and asks_for_right)
    else:
        allowed = topic in _OF_OWN_JOBS and origin.startswith(f"{site}.")
    return None if allowed else new_cell_message({}, error_reply(_said(message, f"the command {topic!r}")))


def _refuse_bulk(message: Message) -> Message | None:
    """The refusal of several messages in one, which NVFlare takes apart without asking; None if all go on."""
    for part in message.payload:
        channel, topic = str(part.get("channel")), str(part.get("topic"))
        if not _is_answered(channel, topic):
            return make_reply(ReturnCode.UNAUTHENTICATED, _said(message, f"{topic!r} of channel {channel!r}"))
    return None


def _is_answered(channel: str, topic: str) -> bool:
    topics = _ANSWERED.get(channel, ())
    return _ALL in topics or topic in topics


def _is_near(origin: str, own: str) -> bool:
    """Whether a cell is the server's, a job's at the server, or of the same site."""
    return origin.partition(".")[0] in (FQCN.ROOT_SERVER, own.partition(".")[0])


def _origin(message: Message) -> str:
    return str(message.get_header(MessageHeaderKey.ORIGIN, ""))


def _said(message: Message, what: str) -> str:
    refused = ReplyKeyword.NOT_AUTHORIZED  # NVFlare's word for it, which its clients look for
    said = f"{what} is {refused}, asked by {_origin(message)!r}: this site answers what a job needs, and nothing else"
    _logger.warning(said)
    return said
