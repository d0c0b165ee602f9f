"""`home.json`: what a home remembers, with whole paths of what is in the home or in the project."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HOME_FILE = "home.json"
FIXED = ("data", "model", "datasets", "jobs")
_FOLLOWS = "model_path"  # where the model's archive lies may change: its digest says whether it is another one


class HomeError(ValueError):
    """A home that cannot be used as it was asked to; the message is one line."""


@dataclass(frozen=True)
class HomeFile:
    """What `home.json` says. `place` is where the home was when it was written."""

    place: Path
    values: dict[str, str]


def read_home(home: Path, project: Path) -> HomeFile | None:
    """What is written down in a home; None if nothing is. Raises HomeError for a file that is something else."""
    path = home / HOME_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        values = {name: content[name] for name in (*FIXED, _FOLLOWS) if content.get(name) is not None}
        place = content["place"]
        if not all(isinstance(value, str) for value in (place, *values.values())):
            raise ValueError("every value is a text")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HomeError(
            f"{path}: does not say what this home is for ({error!r}); restore it, or remove it if you know"
        ) from error
    folders = {"<home>": home, "<project>": project}
    return HomeFile(Path(place), {name: _absolute(value, folders) for name, value in values.items()})


def _absolute(value: str, folders: Mapping[str, Path]) -> str:
    for name, folder in folders.items():
        if value.startswith(f"{name}/"):
            return str(folder / value.removeprefix(f"{name}/"))
    return value
