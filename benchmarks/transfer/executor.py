"""What starts a site of our job in `benchmarks.transfer`: as at a real site, with another command."""

from nvflare.app_common.executors.client_api_executor import ClientAPIExecutor
from nvflare.client.config import ExchangeFormat

from fedsft_assets.federation.site.executor import InstalledTrainer


class BenchmarkSite(InstalledTrainer):
    """Runs `command` in place of a trainer."""

    def __init__(self, command: str) -> None:
        ClientAPIExecutor.__init__(
            self,
            execution_mode="external_process",
            command=command,
            params_exchange_format=ExchangeFormat.PYTORCH,
            server_expected_format=ExchangeFormat.PYTORCH,
        )
