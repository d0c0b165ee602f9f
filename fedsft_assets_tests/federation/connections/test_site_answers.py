"""The requests that a site's cell answers and refuses, as they arrive from the network."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.fuel.f3.cellnet.cell import Cell
from nvflare.fuel.f3.cellnet.core_cell import CoreCell
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, MessageType, ReturnCode
from nvflare.fuel.f3.cellnet.utils import encode_payload
from nvflare.fuel.f3.endpoint import Endpoint
from nvflare.fuel.f3.message import Message
from nvflare.fuel.f3.stats_pool import StatsPoolManager
from nvflare.private.admin_defs import Message as Command
from nvflare.private.admin_defs import ok_reply
from nvflare.private.defs import RequestHeader, new_cell_message
from nvflare.private.fed.utils.fed_utils import nvflare_fobs_initialize

from fedsft_assets.federation.connections.local_driver import new_port
from fedsft_assets.federation.connections.site_answers import answer_only_what_jobs_need

SITE, JOB = "site-1", "site-1.a-job"


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Ask the site; what it answers: `done` if what was asked for was done."""
    nvflare_fobs_initialize()
    cell = Cell(fqcn=SITE, root_url=f"tcp://localhost:{new_port()}", secure=False, credentials={})
    done: list[str] = []
    for channel in ("admin", "_net_manager", "aux_communication", "anything"):
        cell.core_cell.register_request_cb(
            channel, "*", lambda _: done.append("done") or new_cell_message({}, ok_reply())
        )
    answer_only_what_jobs_need(cell.core_cell)
    replies: list[Message] = []
    monkeypatch.setattr(CoreCell, "_send_reply", lambda _, reply, __: replies.append(reply))

    def _ask(channel: str, topic: str, origin: str = "server", payload: Any = None, **headers: Any) -> str:
        done.clear()
        replies.clear()
        message = Message(
            {
                MessageHeaderKey.MSG_TYPE: MessageType.REQ,
                MessageHeaderKey.ORIGIN: origin,
                MessageHeaderKey.DESTINATION: SITE,
                MessageHeaderKey.CHANNEL: channel,
                MessageHeaderKey.TOPIC: topic,
                MessageHeaderKey.REPLY_EXPECTED: True,
                MessageHeaderKey.REQ_ID: "1",
                **headers,
            },
            payload,
        )
        encode_payload(message)
        cell.core_cell._process_received_msg(Endpoint(origin), SimpleNamespace(get_conn_properties=dict), message)
        (reply,) = replies
        body = getattr(reply.payload, "body", None)
        code = reply.get_header(MessageHeaderKey.RETURN_CODE)
        return "done" if done else str(body or code)

    yield _ask
    CoreCell.ALL_CELLS.clear()
    StatsPoolManager.pools.clear()


def _command(topic: str, **headers: str) -> Command:
    command = Command(topic=topic, body="id")
    for name, value in headers.items():
        command.set_header(name, value)
    return command


def _authorized(topic: str) -> Command:
    return _command(topic, **{RequestHeader.REQUIRE_AUTHZ: "true"})


@pytest.mark.parametrize("origin", ["server", "server.a-job", SITE, f"{SITE}.stranger", "site-2", "admin"])
@pytest.mark.parametrize("right", ["true", "false"])
@pytest.mark.parametrize(
    "topic", ["sys.shell", "train.restart", "train.shutdown", "sys.configure_site_log", "sys.info"]
)
def test_commands_that_control_the_machine_are_refused_from_everyone(
    ask: Callable[..., str], topic: str, right: str, origin: str
) -> None:
    said = ask("admin", topic, origin, _command(topic, **{RequestHeader.REQUIRE_AUTHZ: right}))
    assert said == ReturnCode.UNAUTHENTICATED or "is not authorized: this site answers only" in said


@pytest.mark.parametrize(
    "topic",
    ["train.start_job", "train.abort", "train.delete_run", "scheduler.check_resource", "scheduler.cancel_resource"],
)
def test_job_commands_of_the_server_are_answered(ask: Callable[..., str], topic: str) -> None:
    assert ask("admin", topic, payload=_command(topic)) == "done"
    assert "is not authorized" in ask("admin", topic, f"{SITE}.stranger", _command(topic))
    assert ask("admin", topic, "site-2", _command(topic)) == ReturnCode.UNAUTHENTICATED


@pytest.mark.parametrize("topic", ["train.deploy", "train.check_status", "sys.report_version"])
def test_user_commands_are_answered_only_if_the_site_must_authorize_them(ask: Callable[..., str], topic: str) -> None:
    assert ask("admin", topic, payload=_authorized(topic)) == "done"
    assert "is not authorized" in ask("admin", topic, payload=_command(topic))


def test_job_status_is_accepted_from_the_sites_own_jobs_only(ask: Callable[..., str]) -> None:
    topic = "train.notify_job_status"
    assert ask("admin", topic, JOB, _command(topic)) == "done"
    assert "is not authorized" in ask("admin", topic, "server", _command(topic))
    assert "is not authorized" in ask("admin", topic, "server.a-job", _command(topic))


def test_network_tools_are_refused_except_for_the_list_of_peers(ask: Callable[..., str]) -> None:
    assert ask("_net_manager", "peers", "server.a-job") == "done"
    for topic in ("stop", "stop_cell", "change_root", "config_vars", "process_info", "comm_config"):
        assert ask("_net_manager", topic, "server.a-job") == ReturnCode.UNAUTHENTICATED


def test_streamed_request_is_checked_by_its_inner_channel(ask: Callable[..., str]) -> None:
    inside = {"sm__ch": "_net_manager", "sm__tp": "stop"}
    assert ask("sm__STREAM", "sm__DATA", **inside) == ReturnCode.UNAUTHENTICATED


def test_each_message_in_a_bulk_is_checked(ask: Callable[..., str]) -> None:
    parts = [{"channel": "aux_communication", "topic": "x"}, {"channel": "_net_manager", "topic": "stop"}]
    assert ask("cellnet.channel", "bulk", payload=parts) == ReturnCode.UNAUTHENTICATED


def test_parts_of_a_job_exchange_messages_and_other_sites_are_refused(
    ask: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    for origin in ("server.a-job", JOB):
        assert ask("aux_communication", "anything", origin) == "done"
    assert ask("aux_communication", "anything", "site-2.a-job") == ReturnCode.UNAUTHENTICATED
    assert ask("anything", "else", "server") == ReturnCode.UNAUTHENTICATED
    assert "topic 'else' of channel 'anything' from 'server' is not authorized" in caplog.text
