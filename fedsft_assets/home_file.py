"""`home.json`: what a home remembers; paths inside the home or the project are resolved on reading."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HOME_FILE = "home.json"
FIXED = ("data", "model", "datasets", "jobs")
_MAY_CHANGE = ("model_path", "seeds")  # a digest identifies the archive; a study can be extended to more seeds


class HomeError(ValueError):
    """The home cannot be used as requested; the message is one line."""


@dataclass(frozen=True)
class HomeFile:
    """The content of `home.json`. `place` is the home's path when it was written."""

    place: Path
    values: dict[str, str]


def read_home(home: Path, project: Path) -> HomeFile | None:
    """Read the `home.json` of a home; None if there is none. Raises HomeError for an invalid file."""
    path = home / HOME_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        values = {name: content[name] for name in (*FIXED, *_MAY_CHANGE) if content.get(name) is not None}
        place = content["place"]
        if not all(isinstance(value, str) for value in (place, *values.values())):
            raise ValueError("expected strings")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise HomeError(
            f"{path}: not a valid record of what this home is for ({error!r}); restore it, or remove it"
        ) from error
    folders = {"<home>": home, "<project>": project}
    return HomeFile(Path(place), {name: _absolute(value, folders) for name, value in values.items()})


def _absolute(value: str, folders: Mapping[str, Path]) -> str:
    for name, folder in folders.items():
        if value.startswith(f"{name}/"):
            return str(folder / value.removeprefix(f"{name}/"))
    return value
