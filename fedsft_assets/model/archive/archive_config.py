"""Parsing of the untrusted `model_config.yaml` of this project's archives, and artifact names.

NeMo and OmegaConf read the same file: whatever they would import, resolve or download is dropped or refused.
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
# Options of loading and running a model (its location, kernels, possibly downloaded code), not of its architecture.
_LOADING_OPTIONS = {
    *("attn_implementation", "auto_map", "dtype", "experts_implementation"),
    *("quantization_config", "torch_dtype", "transformers_version"),
}
# Transformers writes numbers that JSON lacks as {"__float__": "Infinity"}.
_NON_JSON_NUMBERS = ("Infinity", "-Infinity", "NaN")
_ARTIFACT = re.compile(r"nemo:[0-9a-f]{32}_(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)")


def load_yaml(text: str, where: str) -> dict[str, Any]:
    """Parse the fields of an untrusted YAML file. Raises ModelError that begins with `where`."""
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
    """Refuse aliases and deep nesting, which let a small file stall a parser for hours; NeMo writes neither."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ModelError(f"{where} has YAML aliases")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise ModelError(f"{where} is nested more than {_MAX_DEPTH} levels deep")


def parse_config(content: Mapping[str, Any], where: str, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Validate and return FIELDS, with `hf` passed through `normalize_hf_config`; drop all other fields.

    `content` is the whole file, `sizes` the size in bytes of each archive member by name. Raises ModelError
    that begins with `where`.
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
        raise ModelError(f"{where} has a value that is not allowed in a model's configuration: {error}") from error
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
    """A Hugging Face configuration without options that tell transformers where to load from or which code to run.

    Infinity and NaN, which transformers writes as objects since JSON lacks them, become numbers again.
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
    """The configuration key for a file name: OmegaConf treats a dot in a key as nesting."""
    return name.replace(".", "_")


def artifact_name(value: str) -> str | None:
    """The file name in NeMo's artifact name `nemo:<32 hex digits>_<name>`; None if `value` has another form."""
    match = _ARTIFACT.fullmatch(value)
    return match["name"] if match else None


def artifact_member(name: str, content: bytes) -> str:
    """The archive member's name for a file, `<32 hex digits>_<name>`, with a digest where NeMo has random digits."""
    unique = hashlib.sha256(name.encode() + b"\0" + content).hexdigest()[:32]
    if artifact_name(f"nemo:{unique}_{name}") is None or len(content) > MAX_TOKENIZER_FILE_BYTES:
        raise ModelError(
            f"tokenizer file {name!r}: expected a name of letters, digits, '.', '_' and '-',"
            f" and at most {MAX_TOKENIZER_FILE_BYTES} bytes, found {len(content)}"
        )
    return f"{unique}_{name}"
