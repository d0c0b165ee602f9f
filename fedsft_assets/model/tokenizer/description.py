"""What the content of a tokenizer.json says about texts: its control tokens, its dummy prefix, where its words end.

All functions take the content as the tokenizers library itself writes it. Nothing here encodes anything.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Description = dict[str, Any]

# What a normalizer or pre-tokenizer may put before a text, or take away there, and what says that it does not.
_NO_DUMMY_PREFIX: dict[str, Description] = {
    "Metaspace": {"prepend_scheme": "never"},
    "ByteLevel": {"add_prefix_space": False},
    "Strip": {"strip_left": False},
}
# How vocabularies write a space and other white space: those of bytes have letters for all of it.
_SPACES, _BLANKS = " ▁", "\n\r\t"
_BYTE_SPACES, _BYTE_BLANKS = "Ġ", "Ċčĉ"
# Those that do the same to a part of a text whatever stands elsewhere in it, unless a regular expression looks around.
_LOCAL_NORMALIZERS = {
    *("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Lowercase", "StripAccents", "BertNormalizer"),
    *("Prepend", "Replace", "Strip", "ByteLevel", "Sequence"),
}
_LOCAL_PRE_TOKENIZERS = {
    *("ByteLevel", "Metaspace", "Digits", "Punctuation", "Split", "CharDelimiterSplit"),
    *("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "Sequence"),
}
_LOOKING_AROUND = ("(?=", "(?!", "(?<", "^", "$", r"\b", r"\B", r"\A", r"\z", r"\Z", r"\G")


def reachable_controls(said: Description) -> set[str]:
    """The special tokens that the model itself would make of a text that spells them out.

    Not the one for what is unknown, which stands for text, nor single characters, which texts need.
    """
    model = said["model"]
    special = {token["content"] for token in said["added_tokens"] if token["special"]}
    controls = {token for token in special.intersection(_vocabulary(model)) if len(token) > 1} - {_unknown(model)}
    if controls and model["type"] == "BPE" and not model.get("ignore_merges"):
        return controls & {_merged(model, merge) for merge in model["merges"]}
    return controls


def with_texts_alone(said: Description, names: Mapping[str, str]) -> Description:
    """The tokenizer for texts that are not framed, cut or padded, in which some tokens have other names.

    All keep their ids. `names` are those of `reachable_controls`: no merge makes one of them any more.
    """
    model = said["model"]
    if names:
        vocab = model["vocab"]
        if isinstance(vocab, dict):
            model = {**model, "vocab": {names.get(token, token): id for token, id in vocab.items()}}
        else:
            model = {**model, "vocab": [[names.get(token, token), score] for token, score in vocab]}
        if "merges" in model:
            merges = model["merges"]
            model["merges"] = [merge for merge in merges if names.keys().isdisjoint((*merge, _merged(model, merge)))]
    added = [{**token, "content": names.get(token["content"], token["content"])} for token in said["added_tokens"]]
    nothing = dict.fromkeys(("truncation", "padding", "post_processor", "decoder"))
    return {**said, **nothing, "model": model, "added_tokens": added}


def without_dummy_prefix(said: Description) -> Description:
    """The tokenizer for a text that goes on after another one: nothing is put before it, or taken away there."""
    return {**said, **{part: _going_on(said[part]) for part in ("normalizer", "pre_tokenizer")}}


def words_end_at_spaces(said: Description) -> bool:
    """Whether the tokens of a word and those of the space after it never depend on each other.

    Then a text has the tokens of both its parts, if it is cut between the two: no token of the vocabulary has a space
    after anything but white space, and no rule looks from one part to the other. False where that is not sure.
    """
    model = said["model"]
    marked = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout")
    if model["type"] not in ("BPE", "Unigram") or marked or _added_reach_out(said):
        return False
    parts = [*_parts(said["normalizer"], _LOCAL_NORMALIZERS), *_parts(said["pre_tokenizer"], _LOCAL_PRE_TOKENIZERS)]
    if not all(local and not _looks_around(part) for local, part in parts):
        return False
    of_bytes = any(part["type"] == "ByteLevel" for _, part in parts)
    spaces, blanks = (_BYTE_SPACES, _BYTE_BLANKS) if of_bytes else (_SPACES, _BLANKS)
    special = {token["content"] for token in said["added_tokens"]}
    tokens = [token for token in _vocabulary(model) if token not in special]
    if spaces[-1] not in tokens:
        return False  # a space is unknown to it, as other characters are, and unknown ones may become one token
    return not any(space in token.lstrip(spaces + blanks) for token in tokens for space in spaces)


def _added_reach_out(said: Description) -> bool:
    """Whether tokens that are added and not special may take the space after them, or a dummy prefix behind them."""
    plain = [token for token in said["added_tokens"] if not token["special"]]
    if any(token["rstrip"] or " " in token["content"] for token in plain):
        return True
    return bool(plain) and without_dummy_prefix(said) != said


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


def _going_on(part: Description | None) -> Description | None:
    if part is None or part["type"] == "Prepend":
        return None
    for several in ("normalizers", "pretokenizers"):
        if several in part:
            kept = [_going_on(one) for one in part[several]]
            return {**part, several: [one for one in kept if one is not None]}
    return {**part, **_NO_DUMMY_PREFIX.get(part["type"], {})}


def _parts(part: Description | None, local: set[str]) -> Iterator[tuple[bool, Description]]:
    """A normalizer or pre-tokenizer and all that it consists of, each with whether its kind is one of these."""
    if part is None:
        return
    yield part["type"] in local, part
    for one in part.get("normalizers") or part.get("pretokenizers") or []:
        yield from _parts(one, local)


def _looks_around(part: Description) -> bool:
    """Whether what it searches for may span a word's end, or depends on what stands around it."""
    pattern = part.get("pattern") or {}
    if part["type"] == "Replace":
        return "Regex" in pattern or (" " in pattern["String"] and bool(pattern["String"].strip(" ")))
    # A run of spaces leaves the last one to the word after it: the word before the run has no part in that.
    regex = pattern.get("Regex", "").replace(r"(?!\S)", "").replace("[^", "[")
    return any(sign in regex for sign in _LOOKING_AROUND)
