"""Python environments with what an installation of some extras brings and nothing else, without installing anything.

They are virtual environments whose packages are links into this one, so they take a second and no network.
"""

import sys
import sysconfig
import venv
from collections.abc import Iterable
from importlib.metadata import distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedsft_assets.settings import PROJECT

OWN = "fedsft-assets"


def closure(requirements: Iterable[str]) -> set[str]:
    """Canonical names of all distributions that installing the requirements would bring; all are installed here."""
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found.add(name)
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                waiting += [(Requirement(text), wanted) for text in distribution(name).requires or []]
    return found


def environment_of(requirements: Iterable[str], folder: Path) -> Path:
    """A virtual environment in `folder` with this project and the requirements; gives its folder of programs."""
    venv.create(folder, with_pip=False, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (packages / "fedsft_assets").symlink_to(PROJECT / "fedsft_assets")
    wanted = closure(requirements)
    for found in distributions(path=[sysconfig.get_path("purelib")]):
        name = canonicalize_name(found.metadata["Name"])
        if name in wanted:
            _link(found.files or [], packages)
    return folder / "bin"


def _link(files: Iterable[object], packages: Path) -> None:
    here = Path(sysconfig.get_path("purelib"))
    for first in {Path(str(file)).parts[0] for file in files}:
        if first in ("..", "__pycache__") or first.endswith(".pth") or (packages / first).exists():
            continue
        (packages / first).symlink_to(here / first)


assert sys.prefix != sys.base_prefix, "tests run in the project's virtual environment"
