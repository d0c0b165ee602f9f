"""A site component that explains failed connections, resolves duplicate ones, and refuses other accounts.

NVFlare's client retries forever, whatever is wrong with its startup kit. When two processes connect with the same kit,
the server accepts messages from the one that registered last and drops those of the other, which does not notice. And
on the site's machine, NVFlare's processes accept connections from any account.
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
from fedsft_assets.federation.connections.startup_kit import diagnose_connection
from fedsft_assets.process_env import forget_secrets

_SECONDS_TO_CONNECT = 10.0  # before a missing connection is diagnosed
_SECONDS_BETWEEN_DIAGNOSES = 20.0
# Of two processes with one kit, the one that had this many heartbeats accepted before the other registered stays.
_HEARTBEATS_TO_STAY = 12
# If both had, they would lock each other out in turn; the first to re-register this often gives up.
_MAX_REREGISTRATIONS, _REREGISTRATION_SECONDS = 2, 300.0
_ALREADY_REGISTERED = "already registered"  # in NVFlare's reply to a heartbeat


class SiteConnection(FLComponent):
    """A site's connection to its server; `fedsft-site configure` writes it into the site's `resources.json`."""

    def __init__(self) -> None:
        """NVFlare creates it in the site's own process and in those of jobs, before any connection."""
        super().__init__()
        use_local_driver()
        self._registered = threading.Event()
        self._locked_out = False
        self._accepted_heartbeats = 0
        self._reregistered: deque[float] = deque()  # times, by time.monotonic

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.SYSTEM_BOOTSTRAP:
            forget_secrets()  # jobs must not inherit what the site's operator has exported
            kit = Path(fl_ctx.get_prop(FLContextKey.WORKSPACE_ROOT))
            closed = close_to_others(kit)
            if closed.keys:
                self.logger.error(said_of_kit(kit, closed))
            threading.Thread(
                target=self._diagnose_until_registered, args=(kit,), name="connection", daemon=True
            ).start()
        elif event_type == EventType.BEFORE_CLIENT_REGISTER:  # from then on the server forwards requests
            answer_only_what_jobs_need(fl_ctx.get_engine().get_cell().core_cell)
        elif event_type == EventType.AFTER_CLIENT_REGISTER:
            self._registered.set()
            fl_ctx.get_engine().get_cell().core_cell.add_incoming_reply_filter(
                channel=CellChannel.SERVER_MAIN, topic=CellChannelTopic.HEART_BEAT, cb=self._handle_heartbeat_reply
            )
        elif event_type == EventType.AFTER_CLIENT_HEARTBEAT and self._locked_out:
            self._locked_out = False
            self._register_again(fl_ctx.get_engine())
        elif event_type == EventType.SYSTEM_END:
            self._registered.set()

    def _diagnose_until_registered(self, kit: Path) -> None:
        wait = _SECONDS_TO_CONNECT
        while not self._registered.wait(wait):
            wait = _SECONDS_BETWEEN_DIAGNOSES
            try:
                problem = diagnose_connection(kit)
            except Exception as error:
                problem = str(error)
            if problem:
                self.logger.error(f"not connected: {problem}")

    def _handle_heartbeat_reply(self, reply: Any) -> None:
        if reply.get_header(MessageHeaderKey.RETURN_CODE) == ReturnCode.OK:
            self._accepted_heartbeats += 1
        elif _ALREADY_REGISTERED in str(reply.get_header(MessageHeaderKey.ERROR) or ""):
            self._locked_out = True

    def _register_again(self, engine: Any) -> None:
        """Replace the other process at the server, or shut down if this is the one that must not run."""
        now, site = time.monotonic(), engine.get_client_name()
        while self._reregistered and now - self._reregistered[0] > _REREGISTRATION_SECONDS:
            self._reregistered.popleft()
        if self._accepted_heartbeats < _HEARTBEATS_TO_STAY or len(self._reregistered) >= _MAX_REREGISTRATIONS:
            self.logger.error(
                f"another process is connected as {site} with a copy of this startup kit; shutting this one down, since"
                " a site may run only once. If this is the right one, stop the other and restart this one"
            )
            engine.shutdown()
            return
        self.logger.error(
            f"another process has registered as {site} with a copy of this startup kit and locked this one out;"
            " registering again. Find the process with the copy and stop it: it receives what this site receives. If"
            " you do not know where it is, have a new kit provisioned for this site"
        )
        client = engine.client
        with engine.new_context() as fl_ctx:
            project = client._get_project_name()
            registered = client.communicator.client_registration(client.client_name, project, fl_ctx)
        client.token, client.token_signature, client.ssid = registered
        self._reregistered.append(now)
        self.logger.info(f"registered again as {site}")
