"""A site's process in NVFlare's simulator, controlled by its parent through its standard input, a socket pair.

NVFlare's own process listens on a port instead, and obeys the first client.
"""

import os
from multiprocessing.connection import Connection

from nvflare.fuel.f3.mpm import MainProcessMonitor
from nvflare.private.fed.app.simulator import simulator_worker

from fedsft_assets.federation.connections.local_driver import use_local_driver


def main() -> None:
    parent = Connection(os.dup(0))
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 0)  # its child processes must not inherit the socket
    use_local_driver()
    simulator_worker._create_connection = lambda _: parent
    args = simulator_worker.parse_arguments()
    MainProcessMonitor.run(main_func=simulator_worker.main, run_dir=args.workspace, args=args)


if __name__ == "__main__":
    main()
