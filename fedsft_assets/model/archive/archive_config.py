"""The `model_config.yaml` of this project's archives, parsed without trust in who wrote it, and names of artifacts.

NeMo and OmegaConf read the same file: what they would import, resolve or download is left out or refused.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

from fedsft_assets.model.errors import ModelError

FIELDS = ("hf", "tokenizer", "max_length", "prompt_template")
MAX_CONFIG_BYTES = 1 << 20
MAX_TOKENIZER_FILE_BYTES = 256 << 20

_MAX_DEPTH = 50
# What says how to load or run a model (from where, with which kernels, which may be downloaded code), not what it is.
_LOADING_OPTIONS = {
    *("attn_implementation", "auto_map", "dtype", "experts_implementation"),
    *("quantization_config", "torch_dtype", "transformers_version"),
}
# How transformers writes numbers that JSON does not have: {"__float__": "Infinity"}.
_NON_JSON_NUMBERS = ("Infinity", "-Infinity", "NaN")
_ARTIFACT = re.compile(r"nemo:[0-9a-f]{32}_(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)")


def load_yaml(text: str, where: str) -> dict[str, Any]:
    """The fields of a YAML file that anyone may have written. Raises ModelError that begins with `where`."""
    try:
        _require_plain_yaml(text, where)
        content = yaml.safe_load(text)
    except ModelError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ModelError(f"{where} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{where}: expected fields, found {type(content).__name__}")
    return content


def _require_plain_yaml(text: str, where: str) -> None:
    """Refuse what a small file can keep a parser busy with for hours; NeMo writes none of it."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ModelError(f"{where} has YAML aliases")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise ModelError(f"{where} is nested more than {_MAX_DEPTH} levels deep")


def parse_config(content: Mapping[str, Any], where: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The FIELDS of this project's archives, checked, `hf` by `normalize_hf_config`; all other fields are left out.

    `content` is the whole file, `sizes` has the bytes of the archive's members by name. Raises ModelError that
    begins with `where`.
    """
    missing = [field for field in FIELDS if field not in content]
    if missing:
        raise ModelError(
            f"{where}: has no {', '.join(missing)} (its target is {content.get('target')!r});"
            " not an archive of this project"
        )
    config = {field: content[field] for field in FIELDS}
    try:
        json.dumps(config)
    except TypeError as error:  # YAML has dates and sets
        raise ModelError(f"{where} has a value that no model's configuration has: {error}") from error
    if "${" in yaml.safe_dump(config, width=float("inf")):
        # OmegaConf would resolve it, for example to the value of an environment variable.
        raise ModelError(f"{where} has an interpolation '${{'")
    hf, tokenizer = config["hf"], config["tokenizer"]
    if not isinstance(hf, dict) or not isinstance(hf.get("model_type"), str):
        raise ModelError(f"{where}: hf: expected a Hugging Face configuration with a model_type")
    if not isinstance(tokenizer, dict) or not isinstance(tokenizer.get("files"), dict) or not tokenizer["files"]:
        raise ModelError(f"{where}: tokenizer.files: expected the files of a tokenizer")
    if not isinstance(config["max_length"], int) or config["max_length"] < 2:
        raise ModelError(f"{where}: max_length: expected a number of tokens, found {config['max_length']!r}")
    for key, value in tokenizer["files"].items():
        name = artifact_name(value) if isinstance(value, str) else None
        stored = str(value).removeprefix("nemo:")
        if name is None or stored not in sizes or key != artifact_key(name):
            raise ModelError(f"{where}: tokenizer.files.{key}: {value!r} is not a file of the archive")
        if sizes[stored] > MAX_TOKENIZER_FILE_BYTES:
            raise ModelError(
                f"{where}: tokenizer.files.{key}: {stored} has {sizes[stored]} bytes,"
                f" more than {MAX_TOKENIZER_FILE_BYTES}"
            )
    return {**config, "hf": normalize_hf_config(hf)}


def normalize_hf_config(hf: Mapping[str, Any]) -> dict[str, Any]:
    """A Hugging Face configuration without what tells transformers where to load from and what code to run.

    Infinity and NaN, which JSON does not have and transformers writes as an object, become numbers again.
    """
    return {
        key: _normalize(value)
        for key, value in hf.items()
        if key not in _LOADING_OPTIONS and not str(key).startswith("_")
    }


def _normalize(value: Any) -> Any:
    if isinstance(value, list):
        return [_normalize(one) for one in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"__float__"} and value["__float__"] in _NON_JSON_NUMBERS:
        return float(value["__float__"])
    return normalize_hf_config(value)


def artifact_key(name: str) -> str:
    """The configuration key for a file name: OmegaConf reads a dot in a key as a level."""
    return name.replace(".", "_")


def artifact_name(value: str) -> str | None:
    """The file's own name in `nemo:<32 hex digits>_<name>`, as NeMo names artifacts; None if it is not one."""
    match = _ARTIFACT.fullmatch(value)
    return match["name"] if match else None


def artifact_member(name: str, content: bytes) -> str:
    """The name of a file's member, `<32 hex digits>_<name>`: NeMo's prefix is random, this one is the content's."""
    unique = hashlib.sha256(name.encode() + b"\0" + content).hexdigest()[:32]
    if artifact_name(f"nemo:{unique}_{name}") is None or len(content) > MAX_TOKENIZER_FILE_BYTES:
        raise ModelError(
            f"tokenizer file {name!r}: its name must be of letters, digits, '.', '_' and '-',"
            f" and it may have {MAX_TOKENIZER_FILE_BYTES} bytes, found {len(content)}"
        )
    return f"{unique}_{name}"
