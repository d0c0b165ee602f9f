"""A tokenizer becomes NeMo's two files, which split every text alike, or it is refused by name."""

import json
from typing import Any

import pytest
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors
from transformers import GPT2Tokenizer

from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.megatron.vocabulary import megatron_vocabulary
from fedsft_assets.model.tokenizer.files import tokenizer_files
from fedsft_assets_tests.model.hf_tokenizers import hf_tokenizer

_BEGINNING = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
_TEXT = "It's 3 o'clock — naïve café, 日本語 \t\n\n  don't  stop<|endoftext|>   x\r\n"


def test_gpt2s_tokenizer_of_the_two_files_splits_texts_alike(tmp_path):
    tokenizer = hf_tokenizer("tiny")
    found = megatron_vocabulary(tokenizer_files(tokenizer), "ours.nemo")
    assert (found.tokens, found.special) == (1280, ())
    (tmp_path / "vocab.json").write_bytes(found.vocab_json)
    (tmp_path / "merges.txt").write_bytes(found.merges_txt)
    theirs = GPT2Tokenizer.from_pretrained(tmp_path)
    assert theirs(_TEXT)["input_ids"] == tokenizer(_TEXT, add_special_tokens=False)["input_ids"]


def test_files_are_laid_out_as_nemo_reads_them():
    found = megatron_vocabulary(tokenizer_files(hf_tokenizer("tiny")), "ours.nemo")
    lines = found.merges_txt.decode().split("\n")
    assert lines[0] == "#version: 0.2"
    assert lines[-1] == ""
    assert all(len(line.split(" ")) == 2 for line in lines[1:-1])
    assert len(lines[1:-1]) == 1280 - 256 - 1
    assert list(json.loads(found.vocab_json).values()) == list(range(1280))


def test_added_tokens_are_in_the_vocabulary_and_named():
    tokenizer = hf_tokenizer("tiny")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.add_tokens(["What kind of"])
    found = megatron_vocabulary(tokenizer_files(tokenizer), "ours.nemo")
    assert (found.tokens, found.special) == (1282, ("<|user|>", "What kind of"))
    assert json.loads(found.vocab_json)["What kind of"] == 1281


def _files(**fields: Any) -> dict[str, bytes]:
    """The files of a tokenizer like GPT-2's, with other parts; `model` has fields of its own."""
    files = tokenizer_files(hf_tokenizer("tiny"))
    content = json.loads(files["tokenizer.json"])
    fields["model"] = content["model"] | fields.get("model", {})
    return {**files, "tokenizer.json": json.dumps(content | fields).encode()}


def _said(part: Any) -> dict[str, Any]:
    """What tokenizer.json says of a part."""
    return json.loads(part.__getstate__())


def _with(**special: Any) -> dict[str, bytes]:
    tokenizer = hf_tokenizer("tiny")
    tokenizer.add_special_tokens(special)
    return tokenizer_files(tokenizer)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (_files(normalizer=_said(normalizers.NFKC())), "normalizer: NFKC"),
        (_files(pre_tokenizer=_said(pre_tokenizers.Metaspace())), "pre_tokenizer: .*Metaspace"),
        (_files(pre_tokenizer=_said(pre_tokenizers.ByteLevel(add_prefix_space=True))), "'add_prefix_space': True"),
        (_files(pre_tokenizer=_said(pre_tokenizers.ByteLevel(False, use_regex=False))), "'use_regex': False"),
        (_files(pre_tokenizer=None), "pre_tokenizer: {}"),
        (_files(post_processor=_said(_BEGINNING)), "post_processor: adds tokens"),
        (_files(model={"byte_fallback": True}), r"model\.byte_fallback: True"),
        (_files(model={"ignore_merges": True}), r"model\.ignore_merges: True"),
        (_files(model={"dropout": 0.1}), r"model\.dropout: 0\.1"),
        (_files(model={"type": "WordLevel", "unk_token": "a"}), r"model\.type: 'WordLevel'"),
        (
            _files(model={"vocab": {"<|endoftext|>": 0, "a": 1}, "merges": []}),
            "has no '.', which GPT-2's vocabulary has",
        ),
        (_with(additional_special_tokens=[AddedToken("<tool>", rstrip=True)]), "'<tool>' has lstrip, rstrip"),
        (_with(eos_token="</s>"), r"tokenizer_config\.json: eos_token: '</s>'"),
        (tokenizer_files(hf_tokenizer("with BOS")), "pre_tokenizer: .*Metaspace"),
        ({"spiece.model": b""}, r"tokenizer\.json: is not in the archive, found spiece\.model"),
        ({"tokenizer.json": b"{}"}, r"tokenizer\.json: cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_tokenizer_than_gpt2s_is_refused_by_name(files, words):
    with pytest.raises(ModelError, match=words) as caught:
        megatron_vocabulary(files, "ours.nemo")
    assert str(caught.value).startswith("ours.nemo: tokenizer")


def test_ids_with_gaps_are_refused():
    vocabulary = json.loads(tokenizer_files(hf_tokenizer("tiny"))["tokenizer.json"])["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.__getitem__)
    with pytest.raises(ModelError, match="the ids of its 1280 tokens are not 0 to 1279"):
        megatron_vocabulary(_files(model={"vocab": vocabulary | {last: 1284}}), "ours.nemo")
