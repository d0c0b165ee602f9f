"""NVFlare's simulator as this project runs it: every site has a process of its own from the beginning to the end."""

import time
from multiprocessing.connection import Client, Connection
from typing import Any

from nvflare.private.fed.app.simulator.simulator_runner import SimulatorClientRunner, SimulatorRunner

_SECONDS_BETWEEN_TRIES = 0.05


class Simulation(SimulatorRunner):
    """One job; all of it happens in the calling process and those that it starts."""

    def client_run(self, server_custom_folder: str, clients: list[Any], gpu: str | None) -> None:
        _Sites(server_custom_folder, self.args, clients, self.client_config, self.deploy_args, self.build_ctx).run(gpu)


class _Sites(SimulatorClientRunner):
    """NVFlare's own waits whole seconds wherever a site starts, so that fewer processes than sites can take turns."""

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
