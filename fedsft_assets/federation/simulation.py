"""NVFlare's simulator as this project runs it: every site has a process of its own from the beginning to the end."""

import copy
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Client, Connection
from typing import Any

from nvflare.apis.fl_constant import FLContextKey, MachineStatus, RunProcessKey
from nvflare.private.fed.app.simulator.simulator_runner import SimulatorClientRunner, SimulatorRunner
from nvflare.private.fed.simulator.simulator_const import SimulatorConstants

_SECONDS_BETWEEN_TRIES = 0.05


class Simulation(SimulatorRunner):
    """One job; all of it happens in the calling process and those that it starts."""

    def simulator_run_main(self) -> int:
        """NVFlare's own starts no site before whole seconds have passed. Returns the exit code."""
        if not self.setup():
            return 1
        try:
            self.create_clients()
            engine = self.server.engine
            engine.run_processes[SimulatorConstants.JOB_NAME] = {
                RunProcessKey.JOB_HANDLE: None,
                RunProcessKey.JOB_ID: SimulatorConstants.JOB_NAME,
                RunProcessKey.PARTICIPANTS: engine.client_manager.clients,
            }
            server = threading.Thread(target=self.start_server_app, args=[copy.deepcopy(self.args)])
            server.start()
            while engine.engine_info.status != MachineStatus.STARTED:
                server.join(_SECONDS_BETWEEN_TRIES)
                if not server.is_alive():
                    raise RuntimeError("the server part of the job could not be started")
            self._run_sites()
            self.server.abort_run()
            server.join()
            return int(self._get_server_run_status())
        except Exception:
            self.logger.exception("the simulation failed")
            return 2
        finally:
            self.deployer.close()

    def _run_sites(self) -> None:
        sites = _Sites(
            self.server_custom_folder,
            self.args,
            self.federated_clients,
            self.client_config,
            self.deploy_args,
            self.build_ctx,
        )
        sites.has_ended = self._site_has_ended
        sites.run(None)

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
        try:
            self.do_one_task(client, num_of_threads, gpu, lock, timeout=timeout)
        except Exception:  # nobody looks at this thread
            self.logger.exception(f"{client.client_name}: its process could not be started, or was killed soon")
        finally:
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
