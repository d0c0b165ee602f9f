"""What a job starts at a site: the trainer of the package that is installed there.

NVFlare's own executor takes the command to run from the job, so a site that allows it lets whoever submits jobs run
anything. This one takes nothing from the job: with it alone in the site's `class_allow_list`, no job brings a command.
"""

from nvflare.app_common.executors.client_api_executor import ClientAPIExecutor
from nvflare.client.config import ExchangeFormat

PLAN = "config/plan.json"  # in the site's part of the job folder
COMMAND = ["python3", "-u", "-m", "fedsft_assets.federation.client", "--plan", PLAN]


class InstalledTrainer(ClientAPIExecutor):
    """Runs `fedsft_assets.federation.client` as a process of its own, by the `python3` on the site's path."""

    def __init__(self) -> None:
        super().__init__(
            execution_mode="external_process",
            command=COMMAND,
            params_exchange_format=ExchangeFormat.PYTORCH,
            server_expected_format=ExchangeFormat.PYTORCH,
        )
