"""Looks into `.nemo` archives that anyone may have made, before NeMo opens them.

Reads the layout and the configuration only; never extracts, unpickles or imports anything.
"""

import re
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

CONFIG = "model_config.yaml"
WEIGHTS = "model_weights.ckpt"
FIELDS = ("hf", "tokenizer", "max_length", "prompt_template")

_LARGEST_CONFIG = 1 << 20
_LARGEST_TOKENIZER_FILE = 256 << 20
_MOST_MEMBERS = 64
# What says how to load or run a model (from where, with which kernels, which may be downloaded code), not what it is.
_LOADING_OPTIONS = {
    *("attn_implementation", "auto_map", "dtype", "experts_implementation"),
    *("quantization_config", "torch_dtype", "transformers_version"),
}
_ARTIFACT = re.compile(r"nemo:[0-9a-f]{32}_(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)")


class ModelError(ValueError):
    """A model, archive, tokenizer or set of weights that cannot be used."""


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of an SFTModel archive: the fields named in FIELDS, nothing else, `hf` as by `describe`.

    Whatever else the file says (`target` above all, which names a class to import) is left out.
    Raises ModelError that names the file if it is missing, truncated, no plain tar of plain files,
    or not written by SFTModel.
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such file; expected a .nemo archive")
    try:
        with tarfile.open(path, "r:") as tar:
            members = _members(path, tar)
            if members[CONFIG].size > _LARGEST_CONFIG:
                raise ModelError(f"{path}: {CONFIG} has {members[CONFIG].size} bytes, more than {_LARGEST_CONFIG}")
            file = tar.extractfile(members[CONFIG])
            text = file.read().decode() if file else ""
    except (tarfile.TarError, EOFError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: is not an uncompressed tar archive, or is truncated: {error}") from error
    config = _parse(path, text)
    for key, value in config["tokenizer"]["files"].items():
        name = artifact_name(value) if isinstance(value, str) else None
        stored = members.get(value.removeprefix("nemo:")) if name else None
        if stored is None or name is None or key != artifact_key(name):
            raise ModelError(f"{path}: {CONFIG}: tokenizer.files.{key}: {value!r} is not a file of the archive")
        if stored.size > _LARGEST_TOKENIZER_FILE:
            raise ModelError(f"{path}: {stored.name} has {stored.size} bytes, more than {_LARGEST_TOKENIZER_FILE}")
    return config


def describe(hf: dict[str, Any]) -> dict[str, Any]:
    """A Hugging Face configuration without what tells transformers where to load from and what code to run."""
    return {
        key: describe(value) if isinstance(value, dict) else value
        for key, value in hf.items()
        if key not in _LOADING_OPTIONS and not str(key).startswith("_")
    }


def artifact_key(name: str) -> str:
    """The configuration key for a file name: OmegaConf reads a dot in a key as a level."""
    return name.replace(".", "_")


def artifact_name(value: str) -> str | None:
    """The file's own name in `nemo:<32 hex digits>_<name>`, as NeMo names artifacts; None if it is not one."""
    match = _ARTIFACT.fullmatch(value)
    return match["name"] if match else None


def _members(path: Path, tar: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    members: dict[str, tarfile.TarInfo] = {}
    for count, member in enumerate(tar):
        name = PurePosixPath(member.name)
        if count >= _MOST_MEMBERS:
            raise ModelError(f"{path}: more than {_MOST_MEMBERS} members")
        if member.isdir() and not name.parts:
            continue
        if not member.isreg() or member.issparse() or len(name.parts) != 1 or name.parts[0] in ("..", "/"):
            raise ModelError(f"{path}: member {member.name!r} is not a plain file at the top of the archive")
        if name.name in members:
            raise ModelError(f"{path}: member {member.name!r} is there twice")
        if member.offset_data + member.size > path.stat().st_size:
            raise ModelError(f"{path}: truncated: {member.name!r} ends after the file does")
        members[name.name] = member
    missing = {CONFIG, WEIGHTS} - members.keys()
    if missing:
        raise ModelError(f"{path}: has no {' and no '.join(sorted(missing))}; not a .nemo archive, or truncated")
    return members


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        # An alias lets a small file describe a huge configuration; NeMo writes none.
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise ModelError(f"{path}: {CONFIG} has YAML aliases")
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ModelError(f"{path}: {CONFIG} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: {CONFIG}: expected fields, found {type(content).__name__}")
    missing = [field for field in FIELDS if field not in content]
    if missing:
        raise ModelError(
            f"{path}: not an SFTModel archive: {CONFIG} has no {', '.join(missing)}"
            f" (its target is {content.get('target')!r})"
        )
    config = {field: content[field] for field in FIELDS}
    if "${" in yaml.safe_dump(config, width=float("inf")):
        # OmegaConf would resolve it, for example to the value of an environment variable.
        raise ModelError(f"{path}: {CONFIG} has an interpolation '${{'")
    hf, tokenizer = config["hf"], config["tokenizer"]
    if not isinstance(hf, dict) or not isinstance(hf.get("model_type"), str):
        raise ModelError(f"{path}: {CONFIG}: hf: expected a Hugging Face configuration with a model_type")
    if not isinstance(tokenizer, dict) or not isinstance(tokenizer.get("files"), dict) or not tokenizer["files"]:
        raise ModelError(f"{path}: {CONFIG}: tokenizer.files: expected the files of a tokenizer")
    if not isinstance(config["max_length"], int) or config["max_length"] < 2:
        raise ModelError(f"{path}: {CONFIG}: max_length: expected a number of tokens, found {config['max_length']!r}")
    return {**config, "hf": describe(hf)}
