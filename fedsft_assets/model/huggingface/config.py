"""The configuration files of an exported folder, in words that transformers 5 and 4.57 both know.

Transformers 5 reads what its forerunner wrote, so what has another name now is written under both. Without its old name
a value would not be missed by the older version: it would take a default, and the model would be another one.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsft_assets.model.errors import ModelError

TOKENIZER_CONFIG = "tokenizer_config.json"

# The old names of a rotary embedding's settings, where they are not rope_theta and partial_rotary_factor.
_THETA = {
    "gpt_neox": "rotary_emb_base",
    "gpt_neox_japanese": "rotary_emb_base",
    "modernbert-decoder": "global_rope_theta",
}
_SLIDING_THETA = {
    "gemma3_text": "rope_local_base_freq",
    "gemma3n_text": "rope_local_base_freq",
    "modernbert-decoder": "local_rope_theta",
}
_NEVER_SCALED = {"modernbert-decoder"}
_PARTIAL = {"gpt_neox": "rotary_pct", "gpt_neox_japanese": "rotary_pct"}
# Fields with kinds of layers, and what those kinds were called.
_LAYER_TYPES = {"granitemoehybrid": "layer_types", "zamba": "layers_block_type", "zamba2": "layers_block_type"}
_OLD_LAYER_TYPES = {"linear_attention": "mamba", "full_attention": "attention"}
_OLD_TOKENIZER_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def write_config(hf: Any, folder: Path, where: str) -> None:
    """Write config.json for the configuration `hf`, of which transformers 5 makes the same again.

    Raises ModelError that begins with `where` if it does not.
    """
    # Infinity is written as Python's json reads it: transformers 5 has another form for it, which 4.57 does not know.
    text = json.dumps(_with_old_names(hf), indent=2, sort_keys=True) + "\n"
    again = type(hf).from_dict(json.loads(text)).to_diff_dict()
    lost = sorted(name for name, value in hf.to_diff_dict().items() if again.get(name) != value)
    if lost:
        raise ModelError(f"{where}: hf: {', '.join(lost)}: transformers would not read it again as it is; correct it")
    (folder / "config.json").write_text(text, encoding="utf-8")


def tokenizer_config(content: bytes) -> bytes:
    """A tokenizer_config.json as both versions read it."""
    said = json.loads(content)
    said["tokenizer_class"] = _OLD_TOKENIZER_CLASSES.get(said.get("tokenizer_class"), said.get("tokenizer_class"))
    extra = said.get("extra_special_tokens")
    if isinstance(extra, list):  # the older version has a mapping there, and the list under this name
        said["additional_special_tokens"] = extra
        del said["extra_special_tokens"]
    if said["tokenizer_class"] is None:
        del said["tokenizer_class"]
    return (json.dumps(said, indent=2, ensure_ascii=False) + "\n").encode()


def _with_old_names(hf: Any) -> dict[str, Any]:
    from transformers import PreTrainedConfig

    described: dict[str, Any] = hf.to_diff_dict()
    for name in described:
        if isinstance(part := getattr(hf, name, None), PreTrainedConfig):
            described[name] = _with_old_names(part)
    if "num_experts" in hf.attribute_map:
        described["num_experts"] = hf.num_experts
    if field := _LAYER_TYPES.get(hf.model_type):
        described[field] = [_OLD_LAYER_TYPES.get(kind, kind) for kind in described[field]]
    if rope := described.get("rope_parameters"):
        described |= _old_rope(hf.model_type, rope)
    return described


def _old_rope(kind: str, rope: Mapping[str, Any]) -> dict[str, Any]:
    """What `rope_parameters` says, as before there was such a field. Of several kinds of layers, some had no choice."""
    if "rope_theta" not in rope and any(isinstance(value, Mapping) for value in rope.values()):
        old = _old_rope(kind, rope.get("full_attention") or {})
        sliding = rope.get("sliding_attention") or {}
        if kind in _SLIDING_THETA and "rope_theta" in sliding:
            old[_SLIDING_THETA[kind]] = sliding["rope_theta"]
        return old
    names = {"rope_theta": _THETA.get(kind, "rope_theta"), "partial_rotary_factor": _PARTIAL.get(kind, "")}
    old = {(names[key] or key): rope[key] for key in names if rope.get(key) is not None}
    scaling = {key: value for key, value in rope.items() if key not in names}
    if kind in _NEVER_SCALED or scaling in ({}, {"rope_type": "default"}):
        return old
    return old | {"rope_scaling": scaling}
