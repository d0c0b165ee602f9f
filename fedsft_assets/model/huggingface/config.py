"""The configuration files of an exported folder, readable by both transformers 5 and 4.57.

Transformers 5 also reads the older format, so renamed fields are written under both names. Without the old name, the
older version would silently use a default, and the model would be a different one.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsft_assets.model.errors import ModelError

TOKENIZER_CONFIG = "tokenizer_config.json"

# Old names of a rotary embedding's settings, where they differ from rope_theta and partial_rotary_factor.
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
# Fields that list layer types, and the old names of those types.
_LAYER_TYPES = {"granitemoehybrid": "layer_types", "zamba": "layers_block_type", "zamba2": "layers_block_type"}
_OLD_LAYER_TYPES = {"linear_attention": "mamba", "full_attention": "attention"}
_OLD_TOKENIZER_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def write_config(hf: Any, folder: Path, where: str) -> None:
    """Write config.json for the configuration `hf`.

    Raises ModelError that begins with `where` if transformers 5 would not read it back unchanged.
    """
    # Infinity is written in the form of Python's json: 4.57 does not know that of transformers 5.
    text = json.dumps(_with_old_names(hf), indent=2, sort_keys=True) + "\n"
    again = type(hf).from_dict(json.loads(text)).to_diff_dict()
    lost = sorted(name for name, value in hf.to_diff_dict().items() if again.get(name) != value)
    if lost:
        raise ModelError(f"{where}: hf: {', '.join(lost)}: transformers would not read it back unchanged; correct it")
    (folder / "config.json").write_text(text, encoding="utf-8")


def tokenizer_config(content: bytes) -> bytes:
    """The content of a tokenizer_config.json in a form that both versions read."""
    fields = json.loads(content)
    fields["tokenizer_class"] = _OLD_TOKENIZER_CLASSES.get(fields.get("tokenizer_class"), fields.get("tokenizer_class"))
    extra = fields.get("extra_special_tokens")
    if isinstance(extra, list):  # the older version expects a mapping there, and the list under this name
        fields["additional_special_tokens"] = extra
        del fields["extra_special_tokens"]
    if fields["tokenizer_class"] is None:
        del fields["tokenizer_class"]
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


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
    """`rope_parameters` in the older format, in which some layer types had fixed settings."""
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
