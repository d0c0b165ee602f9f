"""The GPT-2 tokenizer of a Megatron archive, from the vocabulary and merges inside it.

Both are untrusted: sizes and contents are checked, and names in the settings are looked up only in the archive.
"""

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fedsft_assets.model.archive.members import Archive
from fedsft_assets.model.archive.nemo_archive import CONFIG
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.tokenizer.tiny import EOS

_MAX_FILE_BYTES = 32 << 20
_MAX_TOKENS = 1_000_000
_TYPES = ("GPT2BPETokenizer", "gpt2")


def read_tokenizer(archive: Archive, settings: Mapping[str, Any]) -> Tokenizer:
    """GPT-2's byte-level BPE with the archive's vocabulary and merges, and `<|endoftext|>` as a special token.

    Raises ModelError that names the setting, for another kind of tokenizer, or missing or inconsistent files.
    """
    where = f"{archive.path}: {CONFIG}: tokenizer"
    section = settings.get("tokenizer")
    if not isinstance(section, dict):
        raise ModelError(f"{where}: expected its library, type and files, found {type(section).__name__}")
    library, kind = section.get("library"), section.get("type")
    if library != "megatron" or kind not in _TYPES:
        field = f"type: {kind!r}" if library == "megatron" else f"library: {library!r}"
        raise ModelError(f"{where}.{field} is not supported; expected library 'megatron' with type {_TYPES[0]!r}")
    vocabulary = _vocabulary(archive, _artifact(archive, section, "vocab_file", where))
    name = _artifact(archive, section, "merge_file", where)
    merges = _merges(archive, name)
    try:
        bpe = Tokenizer(models.BPE(vocabulary, merges))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelError(f"{archive.path}: {name}: does not fit the vocabulary: {error}") from error
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([EOS, *_additional_tokens(section, where)])
    return bpe


def hugging_face_tokenizer(bpe: Tokenizer) -> Any:
    """The transformers tokenizer; `<|endoftext|>` is BOS, EOS and padding, as in GPT-2."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, bos_token=EOS, pad_token=EOS)


def _additional_tokens(section: Mapping[str, Any], where: str) -> list[str]:
    """Additional special tokens, which NeMo adds to the vocabulary if missing."""
    special = section.get("special_tokens") or {}
    tokens = (special.get("additional_special_tokens") if isinstance(special, dict) else special) or []
    if not isinstance(tokens, list) or len(tokens) > _MAX_TOKENS or not all(t and isinstance(t, str) for t in tokens):
        raise ModelError(f"{where}.special_tokens: expected a list additional_special_tokens, found {special!r:.200}")
    return tokens


def _artifact(archive: Archive, section: Mapping[str, Any], field: str, where: str) -> str:
    value = section.get(field)
    name = value.removeprefix("nemo:") if isinstance(value, str) else ""
    if name not in archive.members:
        raise ModelError(
            f"{where}.{field}: {value!r} is not a file of the archive; add GPT-2's file to it, and set its name here"
        )
    return name


def _vocabulary(archive: Archive, name: str) -> dict[str, int]:
    where = f"{archive.path}: {name}"
    try:
        content = json.loads(archive.text(name, _MAX_FILE_BYTES))
    except (ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{where}: is not JSON: {error}") from error
    if not isinstance(content, dict) or not 256 <= len(content) <= _MAX_TOKENS:
        raise ModelError(f"{where}: expected 256 to {_MAX_TOKENS} tokens and their ids, found {type(content).__name__}")
    if any(type(value) is not int for value in content.values()) or sorted(content.values()) != list(
        range(len(content))
    ):
        raise ModelError(f"{where}: expected each id from 0 to {len(content) - 1} exactly once")
    require_gpt2_tokens(content, where)
    return content


def require_gpt2_tokens(vocabulary: Mapping[str, int], where: str) -> None:
    """Raise ModelError that begins with `where` if the vocabulary lacks EOS or a byte."""
    missing = [token for token in (EOS, *pre_tokenizers.ByteLevel.alphabet()) if token not in vocabulary]
    if missing:
        raise ModelError(f"{where}: has no {missing[0]!r}, which GPT-2's vocabulary has")


def _merges(archive: Archive, name: str) -> list[tuple[str, str]]:
    merges = []
    for number, line in enumerate(archive.text(name, _MAX_FILE_BYTES).split("\n"), 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        first, _, second = line.rstrip("\r").partition(" ")
        if not first or not second or " " in second:
            raise ModelError(f"{archive.path}: {name}: line {number}: expected two tokens, found {line[:80]!r}")
        merges.append((first, second))
    return merges
