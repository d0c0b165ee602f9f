"""Python environments with what an installation of some extras brings and nothing else, without installing anything.

They are virtual environments whose packages are links into this one, so they take a second and no network.
"""

import sys
import sysconfig
import tomllib
import venv
from collections.abc import Iterable, Mapping
from importlib.metadata import distribution, distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fedsft_assets.settings import PROJECT

OWN = "fedsft-assets"


def requirements() -> dict[str, list[str]]:
    """The project's requirements: for every installation under an empty name, and for each extra."""
    described = _project()
    return {"": described["dependencies"], **described["optional-dependencies"]}


def _project() -> dict[str, Any]:
    described: dict[str, Any] = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    return described


def installing(*extras: str) -> list[str]:
    """What `pip install '.[extras]'` asks for; extras that name the project's own are followed."""
    project = requirements()
    wanted = list(project[""])
    for extra in extras:
        for text in project[extra]:
            requirement = Requirement(text)
            own = canonicalize_name(requirement.name) == OWN
            wanted += installing(*requirement.extras) if own else [text]
    return wanted


def closure(wanted: Iterable[str]) -> set[str]:
    """Canonical names of all distributions that installing the requirements would bring; all are installed here."""
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    waiting = [(Requirement(text), "") for text in wanted]
    while waiting:
        requirement, extra = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found.add(name)
        for option in ("", *requirement.extras):
            if (name, option) not in seen:
                seen.add((name, option))
                waiting += [(Requirement(text), option) for text in distribution(name).requires or []]
    return found


def environment_of(wanted: Iterable[str], folder: Path, with_project: bool = True) -> Path:
    """A virtual environment in `folder` with the requirements and this project; gives its folder of programs."""
    venv.create(folder, with_pip=False, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    if with_project:
        (packages / "fedsft_assets").symlink_to(PROJECT / "fedsft_assets")
    names = closure(wanted)
    for found in distributions(path=[sysconfig.get_path("purelib")]):
        name = canonicalize_name(found.metadata["Name"])
        if name in names:
            _link(found.files or [], packages)
            _programs({point.name: point.value for point in found.entry_points.select(group="console_scripts")}, folder)
    if with_project:
        _programs(_project()["scripts"], folder)
    return folder / "bin"


def _programs(functions: Mapping[str, str], folder: Path) -> None:
    for name, value in functions.items():
        module, function = value.split(":")
        program = folder / "bin" / name
        program.write_text(f"#!{folder}/bin/python3\nfrom {module} import {function}\n{function}()\n")
        program.chmod(0o755)


def _link(files: Iterable[object], packages: Path) -> None:
    here = Path(sysconfig.get_path("purelib"))
    for first in {Path(str(file)).parts[0] for file in files}:
        if first in ("..", "__pycache__") or first.endswith(".pth") or (packages / first).exists():
            continue
        (packages / first).symlink_to(here / first)


assert sys.prefix != sys.base_prefix, "tests run in the project's virtual environment"
