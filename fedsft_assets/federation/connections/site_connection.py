"""A component of a site: it says why the site cannot connect, gets it in again when it is locked out, and closes it.

NVFlare's client tries again for ever, whatever is wrong with its startup kit. And where a kit is connected twice, the
server listens to whoever registered last and drops what the other says, which that one never notices. On the site's own
machine, NVFlare's processes listen to everybody: with this one, to their own account alone.
"""

import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey, ReturnCode
from nvflare.private.defs import CellChannel, CellChannelTopic

from fedsft_assets.access import close_to_others, said_of_kit
from fedsft_assets.federation.connections.local_driver import use_local_driver
from fedsft_assets.federation.connections.site_answers import answer_only_what_jobs_need
from fedsft_assets.federation.connections.startup_kit import why_not_connected
from fedsft_assets.process_env import forget_secrets

_SECONDS_TO_CONNECT = 10.0
_SECONDS_BETWEEN_WORDS = 20.0
# Two processes with one kit: the one that the server has heard this often before the other came stays.
_HEARTBEATS_TO_STAY = 12
# If both have, they would lock each other out in turn; the one that has got in again so often first gives up.
_MOST_TIMES, _SECONDS_OF_TIMES = 2, 300.0
_REGISTERED_ALREADY = "already registered"  # of NVFlare's answer to a heartbeat


class SiteConnection(FLComponent):
    """Of a site that connects to its server; `fedsft-site configure` writes it into the site's `resources.json`."""

    def __init__(self) -> None:
        """NVFlare makes it in the site's own process and in those of jobs, before they connect anything."""
        super().__init__()
        use_local_driver()
        self._registered = threading.Event()
        self._locked_out = False
        self._heartbeats = 0  # that the server has accepted
        self._got_in_again: deque[float] = deque()  # when

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.SYSTEM_BOOTSTRAP:
            forget_secrets()  # those that the site's operator has exported are none of the jobs' that this one starts
            kit = Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_ROOT))
            closed = close_to_others(kit)
            if closed.keys:
                self.logger.error(said_of_kit(kit, closed))
            threading.Thread(target=self._say_why_not, args=(kit,), name="connection", daemon=True).start()
        elif event_type == EventType.BEFORE_CLIENT_REGISTER:  # from which on the server hands questions on
            answer_only_what_jobs_need(fl_ctx.get_engine().get_cell().core_cell)
        elif event_type == EventType.AFTER_CLIENT_REGISTER:
            self._registered.set()
            fl_ctx.get_engine().get_cell().core_cell.add_incoming_reply_filter(
                channel=CellChannel.SERVER_MAIN, topic=CellChannelTopic.HEART_BEAT, cb=self._take_answer
            )
        elif event_type == EventType.AFTER_CLIENT_HEARTBEAT and self._locked_out:
            self._locked_out = False
            self._get_in_again(fl_ctx.get_engine())
        elif event_type == EventType.SYSTEM_END:
            self._registered.set()

    def _say_why_not(self, kit: Path) -> None:
        """Until the site is registered."""
        wait = _SECONDS_TO_CONNECT
        while not self._registered.wait(wait):
            wait = _SECONDS_BETWEEN_WORDS
            try:
                why = why_not_connected(kit)
            except Exception as error:
                why = str(error)
            if why:
                self.logger.error(f"not connected: {why}")

    def _take_answer(self, reply: Any) -> None:
        """What the server says to a heartbeat."""
        if reply.get_header(MessageHeaderKey.RETURN_CODE) == ReturnCode.OK:
            self._heartbeats += 1
        elif _REGISTERED_ALREADY in str(reply.get_header(MessageHeaderKey.ERROR) or ""):
            self._locked_out = True

    def _get_in_again(self, engine: Any) -> None:
        """Whoever registers last is listened to; so this one registers again, or it is the one that must not run."""
        now, site = time.monotonic(), engine.get_client_name()
        while self._got_in_again and now - self._got_in_again[0] > _SECONDS_OF_TIMES:
            self._got_in_again.popleft()
        if self._heartbeats < _HEARTBEATS_TO_STAY or len(self._got_in_again) >= _MOST_TIMES:
            self.logger.error(
                f"another process is connected as {site}, with a copy of this startup kit, so this one ends:"
                " a site runs in one place. If this is the right one, end the other and start this one again"
            )
            engine.shutdown()
            return
        self.logger.error(
            f"another process has registered as {site}, with a copy of this startup kit, and this one was locked out;"
            " it registers again. Find the copy and end it: whoever has it gets what this site gets. If you do not"
            " know where it is, have the federation provisioned with a new kit for this site"
        )
        client = engine.client
        with engine.new_context() as fl_ctx:
            project = client._get_project_name()
            registered = client.communicator.client_registration(client.client_name, project, fl_ctx)
        client.token, client.token_signature, client.ssid = registered
        self._got_in_again.append(now)
        self.logger.info(f"registered again as {site}")
