"""What somebody could look at while something runs, and afterwards: modes, command lines, environments, files."""

import os
import stat
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from fedsft_assets.access import OTHERS

_SECONDS_BETWEEN_LOOKS = 0.2
_ZLIB = (b"\x78\x01", b"\x78\x9c", b"\x78\xda")  # how a compressed block begins

# Secrets of all kinds: by what the product reads, by the names that clouds and services give them, by nothing at all.
PLANTED = {
    "HF_TOKEN": "hf_planted-3141",
    "AWS_ACCESS_KEY_ID": "AKIAplanted3141",
    "AWS_SECRET_ACCESS_KEY": "aws-planted-3141/+",
    "AZURE_CLIENT_SECRET": "azure-planted-3141",
    "GOOGLE_APPLICATION_CREDENTIALS": "/planted-3141/service-account.json",
    "WANDB_API_KEY": "wandb-planted-3141",
    "PGPASSWORD": "pg-planted-3141",
    "DATABASE_URL": "postgresql://me:database-planted-3141@db.example.org/x",
    "https_proxy": "http://me:proxy-planted-3141@127.0.0.1:1",
    "FEDSFT_OTHER_PASSWORD": "other-planted-3141",
    "NVFLARE_SOME_TOKEN": "flare-planted-3141",
    "WHATEVER": "whatever-planted-3141",
}
# And of a tracking server, as it is in a URL.
USER, PASSWORD = "planted-user-3141", "s3cr@t/mlflow-3141"
ENCODED = "s3cr%40t%2Fmlflow-3141"
WORDS = [*PLANTED.values(), "database-planted-3141", "proxy-planted-3141", PASSWORD, ENCODED]


@dataclass
class Seen:
    """Of every process that was there, the environment by its pid and command line; and what was open to others."""

    processes: dict[tuple[int, str], dict[str, str]] = field(default_factory=dict)
    open: set[Path] = field(default_factory=set)

    def of(self, word: str) -> list[dict[str, str]]:
        """The environments of processes with this word in their command line."""
        return [environment for (_, command), environment in self.processes.items() if word in command.split()]


@contextmanager
def watching(concerns: Callable[[Mapping[str, str]], bool], folders: Iterable[Path] = ()) -> Iterator[Seen]:
    """Look at all processes of whose environment `concerns` is true, and at modes in these folders, time and again."""
    seen, done, watched = Seen(), threading.Event(), list(folders)

    def look() -> None:
        while not done.wait(_SECONDS_BETWEEN_LOOKS):
            for process in psutil.process_iter():
                with suppress(psutil.Error):
                    environment = process.environ()
                    if concerns(environment) and (command := process.cmdline()):  # which is empty when it ends
                        seen.processes[process.pid, " ".join(command)] = environment
            for folder in watched:
                seen.open.update(path for path in open_to_others(folder) if path != folder)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def open_to_others(folder: Path) -> list[Path]:
    """The folder and what is in it, but for links, of which others may do anything."""
    found = []
    # Unlike a glob, a walk goes on where a folder disappears meanwhile.
    inside = (Path(root) / name for root, folders, files in os.walk(folder) for name in (*folders, *files))
    for path in [folder, *inside]:
        with suppress(FileNotFoundError):
            mode = path.lstat().st_mode
            if not stat.S_ISLNK(mode) and mode & OTHERS:
                found.append(path)
    return found


def holding(folder: Path, words: Iterable[str]) -> dict[str, list[str]]:
    """Which files in a folder have one of these words in them, as it is or in a compressed block."""
    wanted = [word.encode() for word in words]
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            texts = [path.read_bytes(), *_inflated(path)]
            if there := [word.decode() for word in wanted if any(word in text for text in texts)]:
                found[str(path)] = there
    return found


def _inflated(path: Path) -> Iterator[bytes]:
    """What compressed blocks of a database say."""
    if path.suffix not in (".db", ".db-wal"):
        return
    content = path.read_bytes()
    for begins in _ZLIB:
        at = content.find(begins)
        while at >= 0:
            with suppress(zlib.error):
                yield zlib.decompressobj().decompress(content[at:])
            at = content.find(begins, at + 1)
