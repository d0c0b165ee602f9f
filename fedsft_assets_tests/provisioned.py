"""A provisioned federation for tests: NVFlare's own kits with mutual TLS, a server and sites as processes of their own.

Everything is in one folder, every process carries a mark by which it is found and ended again, and nobody touches
the HOME of whoever runs the tests.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from fedsft_assets.federation.protocol.events import Event
from fedsft_assets.federation.runtimes.poc.kits import BUILDERS
from fedsft_assets.federation.runtimes.processes import MARK, marked_processes, stop_marked
from fedsft_assets.federation.supervisor.launch import run_job
from fedsft_assets.specs.runtime import ProductionSettings, RuntimeSettings
from fedsft_assets.store import Store, split_file
from fedsft_assets.versions import current
from fedsft_assets_tests.tracking.server import unused_port

SITES = ("site-1", "site-2", "site-3")
STUDY_USER = "study@example.org"
SERVER = "server"
LOOPBACK = "localhost"  # a server of this name listens on 127.0.0.1 alone
BIN = Path(sys.executable).parent
_SECONDS_TO_CONNECT = 180.0


@dataclass(frozen=True)
class Kits:
    """Where the startup kits of a federation are; `sites` by name."""

    server: Path
    sites: dict[str, Path]
    admin: Path

    def kit(self, name: str) -> Path:
        """That of `server` or of a site."""
        return self.server if name == SERVER else self.sites[name]


def provision(
    folder: Path,
    sites: Sequence[str] = SITES,
    host: str = LOOPBACK,
    port: int | None = None,
    ports_of_sites: Mapping[str, int] | None = None,
) -> Kits:
    """Make the kits of a server at `host` and of sites with NVFlare's provisioning, all below `folder`.

    The server's jobs stay in its kit, and the sites allow what starts a trainer and no code that comes with a job.
    `ports_of_sites` are where sites connect to, if not to the server's own port.
    """
    folder.mkdir(parents=True, exist_ok=True)
    project = {
        "api_version": 3,
        "name": "study",
        "participants": [
            {
                "name": host if host == LOOPBACK else SERVER,
                "type": "server",
                "org": "center",
                "default_host": host,
                "fed_learn_port": port or unused_port(),
            },
            *(_site(site, (ports_of_sites or {}).get(site)) for site in sites),
            {"name": STUDY_USER, "type": "admin", "org": "center", "role": "lead"},
        ],
        "builders": BUILDERS,
    }
    description = folder / "project.yml"
    description.write_text(json.dumps(project, indent=2))  # JSON is YAML
    command = [str(BIN / "nvflare"), "provision", "-p", str(description), "-w", str(folder / "workspace"), "--force"]
    done = subprocess.run(command, env=environment(folder), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    made = folder / "workspace" / "study" / "prod_00"
    kits = Kits(
        server=made / str(project["participants"][0]["name"]),  # type: ignore[index]
        sites={site: made / site for site in sites},
        admin=made / STUDY_USER,
    )
    _configure_server(kits.server)
    for kit in kits.sites.values():
        _configure_site(kit)
    return kits


def _site(name: str, port: int | None) -> dict[str, Any]:
    """A site of NVFlare's project file."""
    described: dict[str, Any] = {"name": name, "type": "client", "org": name.replace("-", "_")}
    return {**described, "connect_to": {"host": LOOPBACK, "port": port}} if port else described


def environment(folder: Path, bin_folder: Path = BIN) -> dict[str, str]:
    """This process's environment, with Python from `bin_folder` and with a HOME below `folder`."""
    home = folder / "empty_home"
    home.mkdir(parents=True, exist_ok=True)
    path = f"{bin_folder}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "HOME": str(home), "PATH": path, "OMP_NUM_THREADS": "1"}


def _configure_server(kit: Path) -> None:
    (kit / "tmp").mkdir()
    command = [sys.executable, "-m", "fedsft_assets.cli.server", "configure", str(kit)]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def take_rights_at_server(kit: Path, *rights: str) -> None:
    """The study's user may no longer do this there."""
    path = kit / "local/authorization.json"
    policy = json.loads(path.read_text())
    for right in rights:
        del policy["permissions"]["lead"][right]
    path.write_text(json.dumps(policy))


def _configure_site(kit: Path) -> None:
    command = [sys.executable, "-m", "fedsft_assets.cli.site", "configure", str(kit)]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


@dataclass
class Federation:
    """A server and sites that run; made by `running`.

    `inside` is put before the command of a participant, to run it elsewhere (`ip netns exec …`); `variables` are
    added to its environment, `bins` say where its Python is.
    """

    kits: Kits
    folder: Path
    inside: Mapping[str, Sequence[str]] = field(default_factory=dict)
    variables: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    bins: Mapping[str, Path] = field(default_factory=dict)
    mark: str = field(default_factory=lambda: f"federation {uuid.uuid4().hex}")

    def start(self, name: str) -> None:
        """Start `server` or a site the way its operator does, in a session of its own."""
        kit = self.kits.kit(name)
        temporary = {"TMPDIR": str(kit / "tmp")} if name == SERVER else {}
        variables = {**environment(self.folder, self.bins.get(name, BIN)), **temporary, **self.variables.get(name, {})}
        with (self.folder / f"{name}.console.log").open("ab") as log:
            subprocess.run(
                [*self.inside.get(name, ()), "bash", str(kit / "startup/start.sh")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**variables, MARK: self.mark_of(name)},
                start_new_session=True,
                check=True,
            )

    def mark_of(self, name: str) -> str:
        """What every process of this participant carries."""
        return f"{self.mark} {name}"

    def stop(self, name: str) -> None:
        """End all processes of a participant."""
        stop_marked(self.mark_of(name))
        # Of a process that was killed, and that nobody has waited for yet, NVFlare's script thinks that it runs.
        (self.kits.kit(name) / "daemon_pid.fl").unlink(missing_ok=True)

    def ask_to_stop(self, name: str) -> None:
        """Have a participant stop the way its operator does it, which takes some ten seconds."""
        with (self.folder / f"{name}.console.log").open("ab") as log:
            subprocess.run(
                ["bash", str(self.kits.kit(name) / "startup/stop_fl.sh")],
                input=b"y",
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(self.folder, self.bins.get(name, BIN)),
                check=True,
            )

    def is_started(self, name: str) -> bool:
        """Whether a participant's start.sh has what it started, which starts NVFlare again when that is gone."""
        for process in marked_processes(self.mark_of(name)):
            with contextlib.suppress(psutil.Error):  # ended since it was listed
                if any(word.endswith("sub_start.sh") for word in process.cmdline()):
                    return True
        return False

    @property
    def marks(self) -> list[str]:
        """Of all participants."""
        return [self.mark_of(name) for name in self.names]

    @property
    def names(self) -> list[str]:
        return [SERVER, *self.kits.sites]

    def end_of_logs(self, lines: int = 40) -> str:
        """The last lines that each participant printed."""
        said = []
        for name in self.names:
            text = (self.folder / f"{name}.console.log").read_text(errors="replace").splitlines()
            said.append("\n".join([f"---- {name}", *text[-lines:]]))
        return "\n".join(said)

    def wait_until_connected(self) -> None:
        """Returns when the server answers and has all sites. Raises TimeoutError with the ends of all logs."""
        until = time.monotonic() + _SECONDS_TO_CONNECT
        found: list[str] = []
        while time.monotonic() < until:
            try:
                with session(self.kits.admin) as connected:
                    while time.monotonic() < until:
                        found = sorted(client.name for client in connected.get_connected_client_list())
                        if found == sorted(self.kits.sites):
                            return
                        time.sleep(0.5)
            except Exception as error:
                found = [f"{type(error).__name__}: {error}"]
                time.sleep(1.0)
        raise TimeoutError(f"expected {sorted(self.kits.sites)} at the server, found {found}\n{self.end_of_logs()}")


@contextmanager
def session(admin: Path) -> Iterator[Any]:
    """An open session of the study's user; NVFlare's own object."""
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    opened = new_secure_session(admin.name, str(admin))
    try:
        yield opened
    finally:
        opened.close()


@contextmanager
def running(federation: Federation) -> Iterator[Federation]:
    """Start the server and all sites, wait until they are connected, and end everything however the block ends."""
    try:
        for name in federation.names:
            federation.start(name)
        federation.wait_until_connected()
        yield federation
    finally:
        for name in federation.names:
            federation.stop(name)


def events_of_job(federation: Federation, store: Store, job: str) -> Iterator[Event]:
    """What happens while the study runs a job in the federation, as `run_job` tells it."""
    return run_job(
        job=current(store.job_folder(job)),
        workspace=store.flare(job),
        testing_file=split_file(current(store.combined), "testing"),
        into=store.checkpoint(job),
        runtime=RuntimeSettings(name="production", production=ProductionSettings(startup_kit=federation.kits.admin)),
    )
