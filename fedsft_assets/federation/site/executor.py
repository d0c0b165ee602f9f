"""The NVFlare executor of a job: starts the trainer of the package installed at the site.

NVFlare's own executor takes the command to run from the job, so a site that allows it lets submitters run anything.
This one takes nothing from the job: if the site's `class_allow_list` has only this class, no job can run other
commands.
"""

from pathlib import Path
from typing import Any

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.executors.client_api_executor import ClientAPIExecutor
from nvflare.client.config import ExchangeFormat
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.message import Message

from fedsft_assets.federation.connections.local_driver import require_local_driver
from fedsft_assets.federation.connections.site_answers import answer_only_what_jobs_need
from fedsft_assets.federation.connections.traffic import count_traffic
from fedsft_assets.federation.protocol.messages import PROGRESS_CHANNEL, PROGRESS_TOPIC
from fedsft_assets.federation.protocol.meter import Meter
from fedsft_assets.federation.protocol.state_folder import site_state_folder
from fedsft_assets.process_env import forget_secrets

PLAN = "config/plan.json"  # in the site's part of the job folder
_SECONDS_TO_ANSWER = 10.0  # timeout for the server's answer; the trainer waits longer
COMMAND = ["python3", "-u", "-m", "fedsft_assets.federation.site.process", "--plan", PLAN]


class InstalledTrainer(ClientAPIExecutor):
    """Runs `fedsft_assets.federation.site.process` in its own process, with the `python3` on the site's PATH."""

    def __init__(self) -> None:
        super().__init__(
            execution_mode="external_process",
            command=COMMAND,
            params_exchange_format=ExchangeFormat.PYTORCH,
            server_expected_format=ExchangeFormat.PYTORCH,
        )

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:  # in the site's job process, before the trainer starts
            forget_secrets()
        elif event_type == EventType.ABOUT_TO_START_RUN:
            require_local_driver("fedsft-site configure")
            cell = fl_ctx.get_engine().get_cell().core_cell
            answer_only_what_jobs_need(cell)
            server = FQCN.join([FQCN.ROOT_SERVER, fl_ctx.get_job_id()])
            count_traffic(cell, _traffic_meter(fl_ctx))
            cell.register_request_cb(PROGRESS_CHANNEL, PROGRESS_TOPIC, _forward, cell=cell, server=server)
        super().handle_event(event_type, fl_ctx)


def _traffic_meter(fl_ctx: FLContext) -> Meter:
    """The meter of this process, beside those of the site's trainer, which reports what they have counted."""
    run_dir = Path(fl_ctx.get_engine().get_workspace().get_run_dir(fl_ctx.get_job_id()))
    return Meter(site_state_folder(run_dir, fl_ctx.get_identity_name()), "connection")


def _forward(message: Message, cell: Any, server: str) -> Message:
    """Forward a trainer's message to the job's server process and return its answer.

    The server identifies the site by the message's token; in NVFlare's own events, the sender is only claimed.
    """
    forwarded = Message(payload=message.payload)
    return cell.send_request(
        PROGRESS_CHANNEL, PROGRESS_TOPIC, server, forwarded, timeout=_SECONDS_TO_ANSWER, optional=True
    )
