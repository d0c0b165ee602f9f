"""The two files that NeMo's GPT-2 tokenizer is made of, from the tokenizer inside an archive of ours.

The way back from `megatron_tokenizer`. A tokenizer that these files cannot express is refused by name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.megatron.tokenizer import require_gpt2_tokens
from fedsft_assets.model.tokenizer.tiny import EOS

# What GPT-2's BPE has. `ignore_merges` would take whole words from the vocabulary, against the merges.
_BPE: dict[str, tuple[Any, ...]] = {
    "type": ("BPE",),
    "dropout": (None, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "byte_fallback": (False,),
    "ignore_merges": (False,),
}
_SPLITTING = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


@dataclass(frozen=True)
class Vocabulary:
    """`vocab.json` and `merges.txt`, how many `tokens` they have, and which are special apart from EOS."""

    vocab_json: bytes
    merges_txt: bytes
    tokens: int
    special: tuple[str, ...]


def megatron_vocabulary(tokenizer_files: Mapping[str, bytes], where: str) -> Vocabulary:
    """The files for a byte-level BPE like GPT-2's that ends texts with `<|endoftext|>`.

    Raises ModelError that begins with `where` and names what another tokenizer has.
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
    # NeMo reads neither the first line of the merges nor what follows the end of the last one.
    return Vocabulary(
        vocab_json=json.dumps(dict(sorted(vocabulary.items(), key=lambda item: item[1]))).encode(),
        merges_txt="\n".join(["#version: 0.2", *merges, ""]).encode(),
        tokens=len(vocabulary),
        special=tuple(sorted(added.keys() - {EOS}, key=lambda token: vocabulary[token])),
    )


def _tokenizer(tokenizer_files: Mapping[str, bytes], where: str) -> dict[str, Any]:
    """The content of tokenizer.json, which does what GPT-2's tokenizer does with its own vocabulary."""
    if "tokenizer.json" not in tokenizer_files:
        raise ModelError(f"{where}: is not in the archive, only {', '.join(sorted(tokenizer_files))}")
    try:
        tokenizer = Tokenizer.from_buffer(tokenizer_files["tokenizer.json"])
    except Exception as error:  # the tokenizers library raises bare Exception for a bad file
        raise ModelError(f"{where}: cannot be read: {error}") from error
    # As the library says it, whatever version wrote the file: with all fields, and merges as pairs.
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    model, splitting = content["model"], content["pre_tokenizer"] or {}
    for field, allowed in _BPE.items():
        if model.get(field, allowed[0]) not in allowed:
            raise ModelError(f"{where}: model.{field}: {model[field]!r} is not what GPT-2's BPE has: {allowed[0]!r}")
    if {field: splitting.get(field) for field in _SPLITTING} != _SPLITTING:
        raise ModelError(f"{where}: pre_tokenizer: {splitting} is not GPT-2's, {_SPLITTING}")
    if content["normalizer"] is not None:
        raise ModelError(f"{where}: normalizer: {content['normalizer']['type']}, but GPT-2 changes no text")
    if tokenizer.encode("a").ids != tokenizer.encode("a", add_special_tokens=False).ids:
        raise ModelError(f"{where}: post_processor: adds tokens to every text, which NeMo's GPT-2 tokenizer cannot")
    for token in content["added_tokens"]:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise ModelError(f"{where}: added_tokens: {token['content']!r} takes in blanks or needs them around it")
    return content


def _require_eos(tokenizer_files: Mapping[str, bytes], where: str) -> None:
    try:
        eos = json.loads(tokenizer_files.get("tokenizer_config.json", b"{}")).get("eos_token")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{where.removesuffix('.json')}_config.json: is no JSON of fields: {error}") from error
    eos = eos.get("content") if isinstance(eos, dict) else eos
    if eos != EOS:
        raise ModelError(
            f"{where.removesuffix('.json')}_config.json: eos_token: {eos!r}, but NeMo's GPT-2 tokenizer"
            f" ends texts with {EOS!r}"
        )
