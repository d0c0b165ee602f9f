"""Reads the user's YAML files strictly and validates them against a model."""

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class SpecError(ValueError):
    """A job file, model or dataset file is invalid."""


class Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


S = TypeVar("S", bound=BaseModel)


def yaml_files(folder: Path) -> list[Path]:
    """The YAML files of a folder, by name. Raises SpecError for `.yml` files, which would silently be ignored."""
    for path in sorted(folder.glob("[!.]*.*")):
        if path.suffix != ".yaml" and path.suffix.lower() in (".yml", ".yaml"):
            raise SpecError(f"{path}: only files that end in .yaml are read; rename it to {path.stem}.yaml")
    return sorted(folder.glob("*.yaml"))


class _Loader(yaml.SafeLoader):
    """Loads plain YAML values; a duplicate field is an error, where PyYAML would take the last one."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name, line = (key.tag, key.value), key.start_mark.line + 1
                if name in lines:
                    raise SpecError(
                        f"line {line}: {key.value}: duplicate field, first in line {lines[name]}; remove one"
                    )
                lines[name] = line
        return node


def read_yaml(path: Path, fields: str) -> dict[str, Any]:
    """The fields of a YAML file; `fields` are examples for the error. Raises SpecError naming the file."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from error
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise SpecError(f"{path}: expected fields like {fields}, found {type(content).__name__}")
    return content


def validated(cls: type[S], path: Path, content: dict[str, Any]) -> S:
    """Validate the file's content. Raises SpecError with one line per invalid field."""
    try:
        return cls.model_validate(content)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            field = ".".join(str(part) for part in problem["loc"]) or "the file"
            found = "" if problem["type"] == "missing" else f", found {problem['input']!r}"
            lines.append(f"{path}: {field}: {problem['msg']}{found}")
        raise SpecError("\n".join(lines)) from error
