"""Analysis of the content of a tokenizer.json: control tokens, dummy prefix, and word boundaries.

All functions take the parsed content as written by the tokenizers library. Nothing here encodes text.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Description = dict[str, Any]

# Normalizers and pre-tokenizers that may add or strip text at the beginning, with the options that disable this.
_NO_DUMMY_PREFIX: dict[str, Description] = {
    "Metaspace": {"prepend_scheme": "never"},
    "ByteLevel": {"add_prefix_space": False},
    "Strip": {"strip_left": False},
}
# How vocabularies write spaces and other white space; byte-level ones use letters for all of it.
_SPACES, _BLANKS = " ▁", "\n\r\t"
_BYTE_SPACES, _BYTE_BLANKS = "Ġ", "Ċčĉ"
# These treat each part of a text independently of the rest, unless a regular expression has lookaround.
_LOCAL_NORMALIZERS = {
    *("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Lowercase", "StripAccents", "BertNormalizer"),
    *("Prepend", "Replace", "Strip", "ByteLevel", "Sequence"),
}
_LOCAL_PRE_TOKENIZERS = {
    *("ByteLevel", "Metaspace", "Digits", "Punctuation", "Split", "CharDelimiterSplit"),
    *("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "Sequence"),
}
_LOOKAROUND = ("(?=", "(?!", "(?<", "^", "$", r"\b", r"\B", r"\A", r"\z", r"\Z", r"\G")


def reachable_controls(content: Description) -> set[str]:
    """The special tokens that the model would produce for a text that spells them out.

    Excludes the unknown token, which stands for text, and single characters, which texts need.
    """
    model = content["model"]
    special = {token["content"] for token in content["added_tokens"] if token["special"]}
    controls = {token for token in special.intersection(_vocabulary(model)) if len(token) > 1} - {_unknown(model)}
    if controls and model["type"] == "BPE" and not model.get("ignore_merges"):
        return controls & {_merged(model, merge) for merge in model["merges"]}
    return controls


def for_plain_text(content: Description, names: Mapping[str, str]) -> Description:
    """The tokenizer without post-processing, truncation and padding, and with some tokens renamed.

    All tokens keep their ids. `names` maps `reachable_controls` to new names; merges that produce them are removed.
    """
    model = content["model"]
    if names:
        vocab = model["vocab"]
        if isinstance(vocab, dict):
            model = {**model, "vocab": {names.get(token, token): id for token, id in vocab.items()}}
        else:
            model = {**model, "vocab": [[names.get(token, token), score] for token, score in vocab]}
        if "merges" in model:
            merges = model["merges"]
            model["merges"] = [merge for merge in merges if names.keys().isdisjoint((*merge, _merged(model, merge)))]
    added = [{**token, "content": names.get(token["content"], token["content"])} for token in content["added_tokens"]]
    removed = dict.fromkeys(("truncation", "padding", "post_processor", "decoder"))
    return {**content, **removed, "model": model, "added_tokens": added}


def without_dummy_prefix(content: Description) -> Description:
    """The tokenizer for a text that continues another one: nothing is added or stripped at its beginning."""
    return {**content, **{part: _continuing(content[part]) for part in ("normalizer", "pre_tokenizer")}}


def words_end_at_spaces(content: Description) -> bool:
    """Whether the tokens of a word and those of the space after it are always independent.

    A text can then be split between the two and encoded in parts: no token of the vocabulary has a space after anything
    but white space, and no rule looks across the split. False if that is uncertain.
    """
    model = content["model"]
    marked = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout")
    if model["type"] not in ("BPE", "Unigram") or marked or _added_tokens_affect_next(content):
        return False
    parts = [
        *_parts(content["normalizer"], _LOCAL_NORMALIZERS),
        *_parts(content["pre_tokenizer"], _LOCAL_PRE_TOKENIZERS),
    ]
    if not all(local and not _looks_around(part) for local, part in parts):
        return False
    byte_level = any(part["type"] == "ByteLevel" for _, part in parts)
    spaces, blanks = (_BYTE_SPACES, _BYTE_BLANKS) if byte_level else (_SPACES, _BLANKS)
    special = {token["content"] for token in content["added_tokens"]}
    tokens = [token for token in _vocabulary(model) if token not in special]
    if spaces[-1] not in tokens:
        return False  # a space is unknown, and could form one unknown token with other unknown characters
    return not any(space in token.lstrip(spaces + blanks) for token in tokens for space in spaces)


def _added_tokens_affect_next(content: Description) -> bool:
    """Whether added, non-special tokens may absorb the space after them, or be followed by a dummy prefix."""
    plain = [token for token in content["added_tokens"] if not token["special"]]
    if any(token["rstrip"] or " " in token["content"] for token in plain):
        return True
    return bool(plain) and without_dummy_prefix(content) != content


def _vocabulary(model: Description) -> Iterator[str]:
    vocab = model["vocab"]
    return iter(vocab) if isinstance(vocab, dict) else (token for token, _ in vocab)


def _unknown(model: Description) -> str | None:
    if "unk_id" not in model:
        return model.get("unk_token")
    return None if model["unk_id"] is None else model["vocab"][model["unk_id"]][0]


def _merged(model: Description, merge: Sequence[str]) -> str:
    left, right = merge
    return left + right.removeprefix(model.get("continuing_subword_prefix") or "")


def _continuing(part: Description | None) -> Description | None:
    if part is None or part["type"] == "Prepend":
        return None
    for children in ("normalizers", "pretokenizers"):
        if children in part:
            kept = [_continuing(child) for child in part[children]]
            return {**part, children: [child for child in kept if child is not None]}
    return {**part, **_NO_DUMMY_PREFIX.get(part["type"], {})}


def _parts(part: Description | None, local: set[str]) -> Iterator[tuple[bool, Description]]:
    """Yield a normalizer or pre-tokenizer and its parts, recursively, each with whether its type is in `local`."""
    if part is None:
        return
    yield part["type"] in local, part
    for child in part.get("normalizers") or part.get("pretokenizers") or []:
        yield from _parts(child, local)


def _looks_around(part: Description) -> bool:
    """Whether a part's pattern may match across the end of a word, or depends on surrounding text."""
    pattern = part.get("pattern") or {}
    if part["type"] == "Replace":
        return "Regex" in pattern or (" " in pattern["String"] and bool(pattern["String"].strip(" ")))
    # `(?!\S)` only leaves the last of a run of spaces to the next word; the word before the run does not matter.
    regex = pattern.get("Regex", "").replace(r"(?!\S)", "").replace("[^", "[")
    return any(syntax in regex for syntax in _LOOKAROUND)
