"""NVFlare's simulator as this project runs it: every site has a process of its own from the beginning to the end."""

import time
from collections.abc import Callable
from multiprocessing.connection import Client, Connection
from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.private.fed.app.simulator.simulator_runner import SimulatorClientRunner, SimulatorRunner

_SECONDS_BETWEEN_TRIES = 0.05


class Simulation(SimulatorRunner):
    """One job; all of it happens in the calling process and those that it starts."""

    def client_run(self, server_custom_folder: str, clients: list[Any], gpu: str | None) -> None:
        sites = _Sites(server_custom_folder, self.args, clients, self.client_config, self.deploy_args, self.build_ctx)
        sites.has_ended = self._site_has_ended
        sites.run(gpu)

    def _site_has_ended(self, site: str) -> None:
        """Tell the server, as the processes of a real site do: else it waits for one whose process was killed."""
        with self.server.engine.new_context() as context:
            if runner := context.get_prop(FLContextKey.RUNNER):
                runner.handle_dead_job(site, context)


class _Sites(SimulatorClientRunner):
    """NVFlare's own waits whole seconds wherever a site starts, so that fewer processes than sites can take turns."""

    has_ended: Callable[[str], None]

    def run_client_thread(
        self,
        num_of_threads: int,
        gpu: str | None,
        lock: Any,
        end_run_for_all: bool,  # noqa: ARG002 it ends with its process
        timeout: float = 60,
    ) -> None:
        with lock:
            client = self.get_next_run_client(gpu)
            client.simulate_running = True
        self.do_one_task(client, num_of_threads, gpu, lock, timeout=timeout)
        client.simulate_running = False
        self.has_ended(client.client_name)

    def _create_connection(self, open_port: int, timeout: float = 60.0) -> Connection:
        """To a site's process; raises RuntimeError if it cannot be reached within so many seconds."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                return Client(("localhost", open_port))
            except OSError as error:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the process of a site did not answer for {timeout:.0f} s") from error
                time.sleep(_SECONDS_BETWEEN_TRIES)
