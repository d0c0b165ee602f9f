"""Updates paths in a moved home: in its MLflow store and outbox.

MLflow stores absolute paths and `file:` URLs, and has no command to change them.
"""

from __future__ import annotations

import json
import re
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from fedsft_assets.files import publish_file
from fedsft_assets.store import Store

_SECONDS_TO_WAIT = 60.0  # for the database lock
_TEXT = re.compile(r"CHAR|TEXT|CLOB|JSON", re.IGNORECASE)  # in the declared type of a column
_URL = "file://"


def relocate(store: Store, old: Path) -> int:
    """Replace the old path with the current one everywhere; returns the number of values changed.

    MLflow's values change in one transaction. Idempotent. Raises sqlite3.OperationalError or OSError.
    """
    moved = path_replacer(old, store.home)
    files = [
        *store.mlflow_artifacts.glob("*/artifacts/*.json"),
        *(file for pattern in ("*.json", "artifacts/*.json") for file in store.outbox.glob(f"*/{pattern}")),
        *store.home.glob("flare/*/*.tracking.json"),
    ]
    return _relocate_database(store.home / "mlflow.db", moved) + sum(_relocate_file(file, moved) for file in files)


def _relocate_database(path: Path, moved: Callable[[str], str]) -> int:
    if not path.is_file():
        return 0
    changed = 0
    with closing(sqlite3.connect(path, timeout=_SECONDS_TO_WAIT, isolation_level=None)) as database:
        database.create_function("moved", 1, lambda text: moved(text) if isinstance(text, str) else text)
        database.execute("BEGIN IMMEDIATE")
        for table, column in _text_columns(database):
            update = f"UPDATE {table} SET {column} = moved({column}) WHERE {column} IS NOT moved({column})"
            changed += database.execute(update).rowcount
        database.execute("COMMIT")
    return changed


def _text_columns(database: sqlite3.Connection) -> list[tuple[str, str]]:
    tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    return [
        (_quoted(table), _quoted(name))
        for table in tables
        for _, name, kind, *_ in database.execute(f"PRAGMA table_info({_quoted(table)})")
        if _TEXT.search(kind)
    ]


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _relocate_file(path: Path, moved: Callable[[str], str]) -> int:
    text = path.read_text(encoding="utf-8")
    if (new := moved(text)) == text:
        return 0
    with publish_file(path) as fresh:
        fresh.write_text(new, encoding="utf-8")
    return 1


def path_replacer(old: Path, new: Path) -> Callable[[str], str]:
    """A function that replaces the old path with the new one in a text: in URLs, in JSON, and in plain text."""
    in_url = _Place(old.as_uri(), new.as_uri())
    as_is = _Place(str(old), str(new))
    in_json = [
        _Place(json.dumps(str(old), ensure_ascii=ascii)[1:-1], json.dumps(str(new), ensure_ascii=ascii)[1:-1])
        for ascii in (True, False)
    ]

    def moved(text: str) -> str:
        text = in_url.moved(text)
        for place in in_json if _is_json(text) else [as_is]:
            text = place.moved(text)
        return text

    return moved


class _Place:
    """One spelling of a path."""

    def __init__(self, old: str, new: str) -> None:
        # The new path first: the old one may be its prefix. Matches whole path components only.
        both = "|".join(map(re.escape, (new, old)))
        before = r"(?<![\w.%~/-])" if old.startswith(_URL) else r"(?:^|(?<=[\s\"'(=,\[]))"
        self._pattern = re.compile(rf"{before}(?:{both})(?=/|$|[\"'),\]])", re.MULTILINE)
        self._new, self._old = new, old

    def moved(self, text: str) -> str:
        return self._pattern.sub(lambda _: self._new, text) if self._old in text else text


def _is_json(text: str) -> bool:
    if text[:1] not in ("{", "[", '"'):
        return False
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
