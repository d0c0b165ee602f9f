"""A site's process in NVFlare's simulator: NVFlare's own, but for how its starter talks with it.

NVFlare lets it listen on a port, and take orders from whoever comes first. Here its starter is at the other end of its
standard input, a pair of sockets that nobody else can have.
"""

import os
from multiprocessing.connection import Connection

from nvflare.fuel.f3.mpm import MainProcessMonitor
from nvflare.private.fed.app.simulator import simulator_worker

from fedsft_assets.federation.connections.local_driver import use_local_driver


def main() -> None:
    starter = Connection(os.dup(0))
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123
        os.dup2(nothing.fileno(), 0)  # what this process starts gets no part of it
    use_local_driver()
    simulator_worker._create_connection = lambda _: starter
    args = simulator_worker.parse_arguments()
    MainProcessMonitor.run(main_func=simulator_worker.main, run_dir=args.workspace, args=args)


if __name__ == "__main__":
    main()
