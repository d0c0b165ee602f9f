"""Which processes of a job are which victim, by what stands in their command lines."""

import contextlib

import psutil

from fedsft_assets.federation.processes import marked_processes
from fedsft_assets_tests.faults.kills import FORK_SERVER, SERVER, SITE, SUPERVISOR, TRAINER

_WORDS = {
    "simulator": {
        SUPERVISOR: "fedsft_assets.federation.supervisor",
        SERVER: "fedsft_assets.federation.simulator",
        SITE: "nvflare.private.fed.app.simulator.simulator_worker",
        TRAINER: "fedsft_assets.federation.client",
        FORK_SERVER: "fedsft_assets.federation.fork_server",
    },
    "poc": {
        SUPERVISOR: "fedsft_assets.federation.supervisor",
        SERVER: "nvflare.private.fed.app.server.runner_process",
        SITE: "nvflare.private.fed.app.client.worker_process",
        TRAINER: "fedsft_assets.federation.client",
    },
}


def find(runtime: str, marks: list[str], victim: str) -> list[psutil.Process]:
    """The processes that are this victim now, among those with one of the marks, the oldest first."""
    found = []
    for process in (process for mark in marks for process in marked_processes(mark)):
        with contextlib.suppress(psutil.Error):  # ended since it was listed
            if _WORDS[runtime][victim] in process.cmdline():
                found.append((process.create_time(), process.pid, process))
    return [process for _, _, process in sorted(found)]
