"""Starting a POC for all sites of the job files, and what its processes are."""

from fedsft_assets.federation.runtimes.poc.kits import SERVER
from fedsft_assets.federation.runtimes.poc.runtime import Poc
from fedsft_assets.federation.runtimes.poc.system import PocStatus, PocSystem


def start(system: PocSystem) -> None:
    """Start what does not run, and wait until all sites are connected. Raises UnavailableError."""
    with Poc(system, system.folder / "commands") as poc:
        poc.prepare(sorted(system.sites))


def describe(status: PocStatus) -> str:
    """A few lines for a person."""
    lines = [f"POC in {status.folder}: {status.state}"]
    if status.services:
        lines.append(f"server {status.address}")
    for name, pid in status.services.items():
        lines.append(f"{'server' if name == SERVER else name:10} {f'pid {pid}' if pid else 'not running'}")
    return "\n".join([*lines, *(f"job        {job}" for job in status.jobs)])
