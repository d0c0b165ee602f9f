"""The commands `fedsft poc prepare|start|status|stop|renew`: manage the POC for all sites of the job files."""

import argparse
import sys
import time

from fedsft_assets.federation.runtimes.choose import poc_system
from fedsft_assets.federation.runtimes.interface import UnavailableError
from fedsft_assets.federation.runtimes.poc.runtime import start
from fedsft_assets.settings import Settings
from fedsft_assets.specs.dataset import load_datasets
from fedsft_assets.specs.job import load_jobs, sites_of
from fedsft_assets.specs.yaml_file import SpecError

_HELP = {
    "prepare": "create the startup kits of a server, an admin and all sites of the job files; starts nothing",
    "start": "start missing processes and wait until all sites are connected; jobs do this automatically",
    "status": "show the running processes and jobs",
    "stop": "end all processes of the POC, including running jobs",
    "renew": "stop it and recreate all startup kits with new keys and certificates",
}
_FOR_ALL_SITES = ("prepare", "start", "renew")


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `poc` and its actions to the command line."""
    poc = commands.add_parser(
        "poc", help="an NVFlare system of processes on this machine: prepare, start, status, stop, renew"
    )
    actions = poc.add_subparsers(dest="action", required=True)
    for action, text in _HELP.items():
        actions.add_parser(action, help=text)


def run(args: argparse.Namespace, settings: Settings) -> None:
    """Run the action and print the status. Exits with a message on failure, or 3 from `status` if nothing runs."""
    begun = time.monotonic()
    try:
        system = poc_system(
            settings.home, settings.where_jobs_run(_sites(settings) if args.action in _FOR_ALL_SITES else [])
        )
        match args.action:
            case "prepare":
                system.prepare()
            case "start":
                start(system)
            case "stop":
                count = system.stop()
                print(f"ended {count} processes in {time.monotonic() - begun:.1f} s")
            case "renew":
                system.renew()
    except (UnavailableError, SpecError) as error:
        sys.exit(str(error))
    status = system.status()
    print(status.describe())
    if args.action == "status" and status.state in ("stopped", "not prepared"):
        sys.exit(3)


def _sites(settings: Settings) -> list[str]:
    """Sites of all job files. Raises SpecError for an invalid file."""
    return sites_of(load_jobs(settings.jobs, list(load_datasets(settings.datasets))))
