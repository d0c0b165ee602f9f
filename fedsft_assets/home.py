"""Binds a home to its purpose: `home.json` records its data, model, and the folders of its datasets and jobs.

Settings given neither as arguments nor in the environment are read from there. They are fixed once anything was made in
the home. Paths inside the home or project are stored relative to it, so both can be moved.
"""

import fcntl
import json
import logging
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from fedsft_assets.access import close_to_others, is_open
from fedsft_assets.disk import explain
from fedsft_assets.files import locked, publish_file
from fedsft_assets.home_file import FIXED, HOME_FILE, HomeError, HomeFile, read_home
from fedsft_assets.settings import Settings
from fedsft_assets.store import HOME_FOLDERS

_LOCK = ".home.lock"
_OPTIONS = ("data", "model")  # of `fedsft study`; the others are environment variables
_MADE = ("raw", "processed", "combined", "base_models", "job_folders", "checkpoints")

_in_use: list[IO[str]] = []  # locks held until this process ends

_log = logging.getLogger(__name__)


def close_home(home: Path) -> None:
    """Make the home private, and warn if it was not, as with homes of earlier versions."""
    known = (home / HOME_FILE).exists() or (home / "poc").exists() or not _is_empty(home)
    closed = close_to_others(home, HOME_FOLDERS)
    if closed.refused:
        _log.warning(
            f"{home}: other accounts of this computer can read it, and its permissions cannot be changed"
            f" ({closed.refused}); set FEDSFT_HOME to a folder on a file system with permissions"
        )
    elif known and closed.count:
        renew = (
            ". Anyone who has read the POC's private keys can still act as its administrator; renew its certificates:"
            f" FEDSFT_HOME={shlex.quote(str(home))} fedsft poc renew"
        )
        _log.warning(
            f"{home}: {closed.count:,} files and folders were open to other accounts of this computer; access removed"
            f"{renew if closed.keys else ''}"
        )


def check_home(settings: Settings) -> None:
    """Raise HomeError if these settings contradict what their home is for, or if its data or model is gone.

    A home open to others is made private, with a warning.
    """
    _close(settings.home)
    if found := read_home(settings.home, settings.project):
        _check(settings, found)


def claim_home(settings: Settings, move: Callable[[Path], object], locks: list[IO[str]] = _in_use) -> None:
    """Bind this home to the settings' purpose while this process lives, and `locks` holds its lock.

    An empty home that no other process uses can be rebound. `move` is called with the old path of a moved home. Raises
    HomeError as `check_home` does, and if the data does not exist.
    """
    try:
        settings.home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if explain(error, settings.home):
            raise
        raise HomeError(
            f"{settings.home}: cannot create this folder: {error}; set FEDSFT_HOME to another one"
        ) from error
    _close(settings.home)
    with locked(settings.home):
        alone = _use(settings.home, locks)
        found = read_home(settings.home, settings.project)
        if found and not (alone and _is_empty(settings.home)):
            _check(settings, found)
        try:
            _ = settings.source
        except ValueError as error:
            raise HomeError(str(error)) from error
        if found and found.place != settings.home:
            move(found.place)
        wanted = settings.purpose
        if found is None or (found.place, found.values) != (settings.home, wanted):
            _write(settings, wanted)


def _close(home: Path) -> None:
    if is_open(home):
        close_home(home)


def _check(settings: Settings, found: HomeFile) -> None:
    file, wanted = settings.home / HOME_FILE, settings.purpose
    other = {}
    for name in FIXED:
        there, here = found.values.get(name, wanted[name]), wanted[name]
        gone = there.startswith("/") and not Path(there).exists()
        if gone and here == there:
            raise HomeError(
                f"{file}: {there}, the {_title(name)} of this home, does not exist any more; give its new path once:"
                f" {_command({name: f'<{_title(name)}>'})}"
            )
        if here != there and not (gone and here.startswith("/") and Path(here).exists()):
            other[name] = here
    if other:
        asked = ", ".join(f"{_title(name)} {value}" for name, value in other.items())
        kept = ", ".join(f"{_title(name)} {found.values.get(name)}" for name in {**dict.fromkeys(_OPTIONS), **other})
        new = {name: value for name, value in wanted.items() if name in other or value != settings.usual.get(name)}
        raise HomeError(
            f"{file}: this home is for {kept}, not for {asked}; use another home for that:"
            f" FEDSFT_HOME={shlex.quote(str(_unused(settings.home)))} {_command(new)}"
        )


def _command(values: Mapping[str, str]) -> str:
    quoted = {name: value if value.startswith("<") else shlex.quote(value) for name, value in values.items()}
    variables = [f"FEDSFT_{name.upper()}={value}" for name, value in quoted.items() if name not in _OPTIONS]
    options = [f"--{name} {value}" for name, value in quoted.items() if name in _OPTIONS]
    return " ".join([*variables, "fedsft study", *options])


def _title(name: str) -> str:
    return {"datasets": "folder of datasets", "jobs": "folder of jobs"}.get(name, name)


def _unused(home: Path) -> Path:
    number = 2
    while (other := home.with_name(f"{home.name}-{number}")).exists():
        number += 1
    return other


def _is_empty(home: Path) -> bool:
    return not any((home / name).exists() for name in _MADE)


def _write(settings: Settings, values: Mapping[str, str]) -> None:
    # The home first: it may be inside the project.
    folders = {"<home>": settings.home, "<project>": settings.project}
    content = {"place": str(settings.home)} | {name: _portable(value, folders) for name, value in values.items()}
    with publish_file(settings.home / HOME_FILE) as fresh:
        fresh.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _portable(value: str, folders: Mapping[str, Path]) -> str:
    if value.startswith("/"):
        for name, folder in folders.items():
            if Path(value).is_relative_to(folder):
                return f"{name}/{Path(value).relative_to(folder).as_posix()}"
    return value


def _use(home: Path, locks: list[IO[str]]) -> bool:
    """Register this process as a user of the home; returns whether it is the only one."""
    lock = (home / _LOCK).open("a")
    locks.append(lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = True
    except BlockingIOError:
        alone = False
    fcntl.flock(lock, fcntl.LOCK_SH)
    return alone
