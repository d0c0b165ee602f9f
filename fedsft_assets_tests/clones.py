"""A clone of this project that is set up and has one small job, with an account's home beside it, to type commands in.

And a clone in which programs only write down how they were started.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import psutil

from fedsft_assets.settings import PROJECT
from fedsft_assets_tests.documents import Command
from fedsft_assets_tests.environments import environment_of, installing

SMALL_JOB = """\
description: FedAvg over the three sites, as little of it as a model needs to say anything
sites:
  site-1: {dataset: alpaca}
  site-2: {dataset: dolly}
  site-3: {dataset: oasst1}
rounds: 1
max_local_steps: 8
max_evaluation_records: 20
"""
_NOT_CLONED = (".git", ".venv", ".fedsft*", "__pycache__", ".*_cache", "build", "*.egg-info")
# What a developer's shell may have set, and a reader's has not.
_DEVELOPERS = (
    "FEDSFT_",
    "PYTHON",
    "DAGSTER_",
    "PYTEST_",
    "MLFLOW_",
    "HF_",
    "MAKE",
    "MFLAGS",
    "DATA",
    "MODEL",
    "SEEDS",
    "JOB",
    "UV_",
)
_READY = "ready in half a minute"
_SECONDS_TO_SERVE = 600
_RECORDER = """#!{python} -IS
import json, os, pathlib, shutil, sys
if sys.argv[1:3] == ["-m", "venv"]:
    (programs := pathlib.Path(sys.argv[3], "bin")).mkdir(parents=True)
    shutil.copy(sys.argv[0], programs / "python")
elif sys.argv[1:2] != ["-c"]:
    started = dict(argv=sys.argv, environment=dict(os.environ))
    with open({record!r}, "a") as record:
        record.write(json.dumps(started) + "\\n")
"""


@dataclass(frozen=True)
class Page:
    """Pages that are served at `url`, for whoever has the token. The page `probe` is there when they are ready."""

    url: str
    token: str
    probe: str = ""

    @property
    def base(self) -> str:
        return "{0.scheme}://{0.netloc}".format(urlsplit(self.url))

    def status(self, token: str = "") -> int:
        """The HTTP status that a request with this token gets; 0 while nobody answers."""
        request = urllib.request.Request(
            f"{self.base}{self.probe}", headers={"Authorization": f"Bearer {token}"} if token else {}
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0


class Clone:
    """A clone in `folder`, where `make setup` has nothing left to do."""

    def __init__(self, place: Path) -> None:
        self.folder, self.account, programs = place / "fedsft", place / "account", place / "programs"
        shutil.copytree(PROJECT, self.folder, ignore=shutil.ignore_patterns(*_NOT_CLONED))
        set_up = environment_of(installing("study", "dev"), self.folder / ".venv")
        (package,) = set_up.parent.glob("lib/python*/site-packages/fedsft_assets")
        package.unlink()
        package.symlink_to(self.folder / "fedsft_assets")
        for done in (set_up / "uv", set_up.parent / ".ready"):
            done.touch()
        for job in (self.folder / "jobs").glob("*.yaml"):
            job.unlink()
        (self.folder / "jobs/fedavg.yaml").write_text(SMALL_JOB)
        _beside(place)
        for folder in (self.account, programs):
            folder.mkdir()
        for name in ("python", "python3"):  # those of the machine may need the account's real home
            (programs / name).write_text(f'#!/bin/sh\nexec "{set_up}/python" "$@"\n')
            (programs / name).chmod(0o700)
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(_DEVELOPERS)},
            "HOME": str(self.account),
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        }

    def run(self, script: str, variables: Mapping[str, str], said: str) -> str:
        """What a shell prints on standard output that runs these lines, with `said` on its standard input.

        They must succeed.
        """
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=self.folder,
            env={**self._environment, **variables},
            input=said,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{script}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    @contextmanager
    def serving(self, script: str) -> Iterator[dict[str, Page]]:
        """Run these lines, of which the last serves pages until Ctrl-C; yield the pages by title, once they answer.

        All that was started has ended afterwards.
        """
        with (self.account / "printed").open("w+") as printed:
            shell = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", script],
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            processes: list[psutil.Process] = []
            try:
                pages = self._pages(shell, Path(printed.name))
                processes = psutil.Process(shell.pid).children(recursive=True)
                yield pages
                os.killpg(shell.pid, signal.SIGINT)
                _, left = psutil.wait_procs(processes, timeout=60)
                assert left == []
            finally:
                self.stop_all()
                shell.wait()

    def _pages(self, shell: "subprocess.Popen[bytes]", printed: Path) -> dict[str, Page]:
        deadline = time.monotonic() + _SECONDS_TO_SERVE

        def wait(why: str) -> None:
            assert shell.poll() is None, printed.read_text()[-6000:]
            assert time.monotonic() < deadline, f"{why} after {_SECONDS_TO_SERVE} s"
            time.sleep(0.3)

        while _READY not in (text := printed.read_text()):
            wait("no links were printed")
        links = [
            line.split(":", 1)
            for line in text.splitlines()
            if ": " in line and "http://127.0.0.1:" in line and not line.startswith("curl ")
        ]
        files = [
            line.split()[-1] for line in text.splitlines() if line.startswith("append ?token=… with the token in ")
        ]
        fixed = Path(files[0]).read_text().strip() if files else ""
        pages = {
            title: Page(link.strip(), fixed or parse_qs(urlsplit(link).query)["token"][0]) for title, link in links
        }
        for line in text.splitlines():
            if line.startswith("curl "):  # what asks a model
                pages["model"] = Page(line.split()[2], line.split()[-1].rstrip('"'), "/ping")
        for title, page in pages.items():
            while page.status(page.token) != 200:
                wait(f"{title} does not answer")
        return pages

    def stop_all(self) -> list[str]:
        """End every process that works in this clone or over one of its homes; gives their command lines."""
        found = []
        for process in psutil.process_iter():
            try:
                environment = process.environ()
                here = any(environment.get(name, "").startswith(str(self.folder)) for name in ("FEDSFT_HOME", "PWD"))
                if here and process.pid != os.getpid():
                    found.append(" ".join(process.cmdline()))
                    process.kill()
            except psutil.Error:
                continue  # ended meanwhile, or another user's
        return found


@dataclass(frozen=True)
class Started:
    """How a program was started: its words, from the program's name on, and its environment."""

    argv: list[str]
    environment: dict[str, str]


class Rehearsal:
    """A clone whose Python and commands write down how they are started and do nothing."""

    def __init__(self, place: Path) -> None:
        self.folder, self._record = place / "fedsft", place / "record"
        (programs := self.folder / ".venv/bin").mkdir(parents=True)
        for name in ("Makefile", "pyproject.toml", "requirements.txt"):
            shutil.copyfile(PROJECT / name, self.folder / name)
        _beside(place)
        interpreter = Path(sys.executable).resolve()
        for name in ("python", "uv", "fedsft", "fedsft-generate"):
            (programs / name).write_text(_RECORDER.format(python=interpreter, record=str(self._record)))
            (programs / name).chmod(0o700)
        (self.folder / ".venv/.ready").touch()
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(_DEVELOPERS)},
            "HOME": str(place),
        }

    def started(self, command: Command, script: str) -> list[Started]:
        """What the command would start."""
        self._record.write_text("")
        shell = ["bash", "-euo", "pipefail", "-c", script]
        done = subprocess.run(
            shell, cwd=self.folder, env=self._environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command.page}: {script}\n{done.stderr}"
        records: list[dict[str, Any]] = [json.loads(line) for line in self._record.read_text().splitlines()]
        return [Started(**record) for record in records]


def _beside(place: Path) -> None:
    """What lies beside the project lies beside its clone too."""
    if (shared := PROJECT.parent / "shared").is_dir():
        (place / "shared").symlink_to(shared)
