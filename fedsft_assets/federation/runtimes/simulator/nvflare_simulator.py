"""NVFlare's simulator with one process per site for the whole job."""

import copy
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from nvflare.apis.fl_constant import FLContextKey, MachineStatus, RunnerTask, RunProcessKey
from nvflare.private.fed.app.simulator.simulator_runner import SimulatorClientRunner, SimulatorRunner
from nvflare.private.fed.simulator.simulator_const import SimulatorConstants

from fedsft_assets.federation.connections.local_driver import is_supported, new_port, use_local_driver
from fedsft_assets.process_env import child_environment

SITE_MODULE = "fedsft_assets.federation.runtimes.simulator.site"
_POLL_SECONDS = 0.05


class Simulation(SimulatorRunner):
    """One job, in the calling process and those that it starts."""

    def simulator_run_main(self) -> int:
        """Run the job without the fixed waits of NVFlare's own method. Returns the exit code."""
        use_local_driver()
        if is_supported():
            self.deployer.open_ports = [new_port()]
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
                server.join(_POLL_SECONDS)
                if not server.is_alive():
                    raise RuntimeError("the job's server did not start")
            self._run_sites()
            self.server.abort_run()
            server.join()
            return int(self._get_server_run_status())
        except Exception:
            self.logger.exception("simulation failed")
            return 2
        finally:
            self.deployer.close()

    def _run_sites(self) -> None:
        sites = SiteRunner(
            self._site_has_ended,
            self.server_custom_folder,
            self.args,
            self.federated_clients,
            self.client_config,
            self.deploy_args,
            self.build_ctx,
        )
        sites.run(None)

    def _site_has_ended(self, site: str) -> None:
        """Report the site as dead, as a real site's processes do: otherwise the server waits for a killed site."""
        with self.server.engine.new_context() as context:
            if runner := context.get_prop(FLContextKey.RUNNER):
                runner.handle_dead_job(site, context)


class SiteRunner(SimulatorClientRunner):
    """Starts all sites at once, without the waits of NVFlare's own runner for sites that share a process."""

    def __init__(self, has_ended: Callable[[str], None], *args: Any) -> None:
        """`has_ended` is called with the name of each site whose process has ended."""
        super().__init__(*args)
        self._has_ended = has_ended

    def run_client_thread(
        self,
        num_of_threads: int,
        gpu: str | None,
        lock: Any,
        end_run_for_all: bool,  # noqa: ARG002 a site's run ends with its process
        timeout: float = 60,
    ) -> None:
        with lock:
            client = self.get_next_run_client(gpu)
            client.simulate_running = True
        try:
            self.do_one_task(client, num_of_threads, gpu, lock, timeout=timeout)
        except (EOFError, OSError) as error:
            self.logger.error(f"{client.client_name}: its process died: {error!r}")
        except Exception:  # nothing reads the result of this thread
            self.logger.exception(f"{client.client_name}: its process did not start, or was killed early")
        finally:
            client.simulate_running = False
            self._has_ended(client.client_name)

    def do_one_task(self, client: Any, *_: Any, **__: Any) -> None:
        """Run all tasks of a site in a process of its own. Raises EOFError if the process dies.

        NVFlare's own process obeys the first client on its port; this one is controlled through its standard input.
        """
        own, given = socket.socketpair()
        with own, given:
            process = subprocess.Popen(
                self._command(client), env=child_environment(), stdin=given.fileno(), start_new_session=True
            )
            given.close()
            deploy_args = copy.deepcopy(self.deploy_args)
            deploy_args.workspace = str(Path(deploy_args.workspace) / client.client_name)
            orders = {
                SimulatorConstants.CLIENT_CONFIG: self.client_config,
                SimulatorConstants.DEPLOY_ARGS: deploy_args,
                SimulatorConstants.BUILD_CTX: {**self.build_ctx, "client_name": client.client_name},
            }
            try:
                with Connection(os.dup(own.fileno())) as site:
                    site.send(orders)
                    while not site.recv():
                        site.send(True)  # continue
                    site.recv()
                    site.send(False)
            finally:
                self._cleanup_process(process)

    def _command(self, client: Any) -> list[str]:
        """NVFlare's own command, with another module."""
        options = {
            "-o": Path(self.args.workspace) / client.client_name,
            "--logging_config": self.args.log_config,
            "--client": client.client_name,
            "--token": client.token,
            "--port": "none",
            "--parent_pid": os.getpid(),
            "--simulator_root": self.simulator_root,
            "--root_url": client.cell.get_root_url_for_child(),
            "--task_name": RunnerTask.TASK_EXEC,
            "--decomposer_module": None,
        }
        words = [str(word) for option in options.items() for word in option]
        return [sys.executable, "-m", SITE_MODULE, *words]
