"""What a job starts at a site: the trainer of the package that is installed there.

NVFlare's own executor takes the command to run from the job, so a site that allows it lets whoever submits jobs run
anything. This one takes nothing from the job: with it alone in the site's `class_allow_list`, no job brings a command.
"""

from nvflare.apis.analytix import AnalyticsData
from nvflare.apis.dxo import DXO
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.executors.client_api_executor import ClientAPIExecutor
from nvflare.client.config import ExchangeFormat
from nvflare.fuel.f3.cellnet.core_cell import Message
from nvflare.fuel.f3.cellnet.fqcn import FQCN

from fedsft_assets.federation.connections.local_driver import require_local_driver
from fedsft_assets.federation.connections.site_answers import answer_only_what_jobs_need
from fedsft_assets.federation.protocol.messages import PROGRESS_CHANNEL, PROGRESS_RECORD, PROGRESS_TOPIC
from fedsft_assets.process_env import forget_secrets

PLAN = "config/plan.json"  # in the site's part of the job folder
COMMAND = ["python3", "-u", "-m", "fedsft_assets.federation.site.process", "--plan", PLAN]


class InstalledTrainer(ClientAPIExecutor):
    """Runs `fedsft_assets.federation.site.process` as a process of its own, by the `python3` on the site's path."""

    def __init__(self) -> None:
        super().__init__(
            execution_mode="external_process",
            command=COMMAND,
            params_exchange_format=ExchangeFormat.PYTORCH,
            server_expected_format=ExchangeFormat.PYTORCH,
        )

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.START_RUN:  # in the process of the job at the site, before it starts the trainer
            forget_secrets()
        elif event_type == EventType.ABOUT_TO_START_RUN:
            require_local_driver("fedsft-site configure")
            answer_only_what_jobs_need(fl_ctx.get_engine().get_cell().core_cell)
        super().handle_event(event_type, fl_ctx)

    def fire_log_analytics(self, fl_ctx: FLContext, dxo: DXO) -> None:
        """Send what the trainer says to the server's part of the job, which knows by the message's token who sent it.

        NVFlare would fire an event, in which a site can say that it is another.
        """
        record = AnalyticsData.from_dxo(dxo)
        if record is None or record.tag != PROGRESS_RECORD:
            return
        cell = fl_ctx.get_engine().get_cell()
        cell.core_cell.fire_and_forget(
            channel=PROGRESS_CHANNEL,
            topic=PROGRESS_TOPIC,
            targets=FQCN.join([FQCN.ROOT_SERVER, fl_ctx.get_job_id()]),
            message=Message(payload=record.value),
            optional=True,
        )
