"""The two files of NeMo's GPT-2 tokenizer, from the tokenizer in one of this project's archives.

The reverse of `megatron.tokenizer`. Tokenizer features that these files cannot express are refused by name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.megatron.tokenizer import require_gpt2_tokens
from fedsft_assets.model.tokenizer.tiny import EOS

# GPT-2's BPE settings. `ignore_merges` would take whole words from the vocabulary regardless of the merges.
_BPE: dict[str, tuple[Any, ...]] = {
    "type": ("BPE",),
    "dropout": (None, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (False,),
    "ignore_merges": (False,),
}
_PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


@dataclass(frozen=True)
class Vocabulary:
    """The contents of `vocab.json` and `merges.txt`, the number of tokens, and the special tokens other than EOS."""

    vocab_json: bytes
    merges_txt: bytes
    tokens: int
    special: tuple[str, ...]


def megatron_vocabulary(tokenizer_files: Mapping[str, bytes], where: str) -> Vocabulary:
    """The files for a byte-level BPE like GPT-2's, with `<|endoftext|>` as EOS.

    Raises ModelError that begins with `where` and names a setting that differs from GPT-2's.
    """
    where = f"{where}: tokenizer.json"
    content = _tokenizer(tokenizer_files, where)
    _require_eos(tokenizer_files, where)
    added = {token["content"]: token["id"] for token in content["added_tokens"]}
    vocabulary = {**content["model"]["vocab"], **added}
    require_gpt2_tokens(vocabulary, where)
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise ModelError(f"{where}: the ids of its {len(vocabulary)} tokens are not 0 to {len(vocabulary) - 1}")
    merges = (" ".join(merge) for merge in content["model"]["merges"])
    # NeMo skips the first line of the merges, and whatever follows the last line end.
    return Vocabulary(
        vocab_json=json.dumps(dict(sorted(vocabulary.items(), key=lambda item: item[1]))).encode(),
        merges_txt="\n".join(["#version: 0.2", *merges, ""]).encode(),
        tokens=len(vocabulary),
        special=tuple(sorted(added.keys() - {EOS}, key=lambda token: vocabulary[token])),
    )


def _tokenizer(tokenizer_files: Mapping[str, bytes], where: str) -> dict[str, Any]:
    """The content of tokenizer.json. Raises ModelError if it does not work like GPT-2's with its vocabulary."""
    if "tokenizer.json" not in tokenizer_files:
        raise ModelError(f"{where}: is not in the archive, found {', '.join(sorted(tokenizer_files))}")
    try:
        tokenizer = Tokenizer.from_buffer(tokenizer_files["tokenizer.json"])
    except Exception as error:  # the tokenizers library raises bare Exception for a bad file
        raise ModelError(f"{where}: cannot be read: {error}") from error
    # Normalized by the library, whatever version wrote the file: with all fields, and merges as pairs.
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    model, pre_tokenizer = content["model"], content["pre_tokenizer"] or {}
    for field, allowed in _BPE.items():
        if model.get(field, allowed[0]) not in allowed:
            raise ModelError(f"{where}: model.{field}: {model[field]!r} is not GPT-2's; expected {allowed[0]!r}")
    if {field: pre_tokenizer.get(field) for field in _PRE_TOKENIZER} != _PRE_TOKENIZER:
        raise ModelError(f"{where}: pre_tokenizer: {pre_tokenizer} is not GPT-2's; expected {_PRE_TOKENIZER}")
    if content["normalizer"] is not None:
        raise ModelError(f"{where}: normalizer: {content['normalizer']['type']}, but GPT-2 has no normalizer")
    if tokenizer.encode("a").ids != tokenizer.encode("a", add_special_tokens=False).ids:
        raise ModelError(f"{where}: post_processor: adds tokens to every text, which NeMo's GPT-2 tokenizer cannot do")
    for token in content["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise ModelError(
                f"{where}: added_tokens: {token['content']!r} has lstrip, rstrip or single_word, which NeMo's GPT-2"
                " tokenizer cannot express"
            )
    return content


def _require_eos(tokenizer_files: Mapping[str, bytes], where: str) -> None:
    try:
        eos = json.loads(tokenizer_files.get("tokenizer_config.json", b"{}")).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{where.removesuffix('.json')}_config.json: is not a JSON object: {error}") from error
    eos = eos.get("content") if isinstance(eos, dict) else eos
    if eos != EOS:
        raise ModelError(
            f"{where.removesuffix('.json')}_config.json: eos_token: {eos!r}, but NeMo's GPT-2 tokenizer"
            f" ends texts with {EOS!r}"
        )
