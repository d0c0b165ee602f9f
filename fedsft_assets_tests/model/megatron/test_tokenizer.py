"""The tokenizer of an archive: GPT-2's algorithm on the archive's own files, which anyone may have made."""

import json

import pytest
import yaml
from transformers import GPT2TokenizerFast

from fedsft_assets.model.archive.members import open_archive
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.megatron.tokenizer import hugging_face_tokenizer, read_tokenizer
from fedsft_assets_tests.model.megatron_archives import (
    MERGES_FILE,
    SETTINGS,
    VOCAB_FILE,
    VOCABULARY,
    members,
    write_tar,
)


@pytest.fixture
def read(tmp_path):
    """The tokenizer of an archive with these files."""

    def make(files):
        with open_archive(write_tar(tmp_path / "megatron.nemo", files), tmp_path) as source:
            return hugging_face_tokenizer(read_tokenizer(source, yaml.safe_load(files["model_config.yaml"])))

    return make


TEXT = "Thinking of the thing.\n\n  Grüße, 世界 🙂"


def test_the_tokenizer_is_gpt2s_with_the_archives_own_files(read, tmp_path):
    files = members(SETTINGS)
    tokenizer = read(files)
    for name, file in ((VOCAB_FILE, "vocab.json"), (MERGES_FILE, "merges.txt")):
        (tmp_path / file).write_bytes(files[name])
    reference = GPT2TokenizerFast.from_pretrained(tmp_path)
    for text in (TEXT, "thing then", "a<|endoftext|>b", ""):
        assert tokenizer(text)["input_ids"] == reference(text)["input_ids"]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("thing then")["input_ids"] == [VOCABULARY[token] for token in ["t", "h", "ing", "Ġth", "e", "n"]]
    end = VOCABULARY["<|endoftext|>"]
    assert tokenizer("a<|endoftext|>")["input_ids"] == [VOCABULARY["a"], end]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (end, end, end)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"library": "sentencepiece"}, r"tokenizer\.library: 'sentencepiece' is not supported"),
        ({"library": "huggingface", "type": "gpt2"}, r"tokenizer\.library: 'huggingface'"),
        ({"type": "BertWordPieceCase"}, r"tokenizer\.type: 'BertWordPieceCase'"),
        ({"vocab_file": None}, r"tokenizer\.vocab_file: None is not a file of the archive"),
        ({"merge_file": "nemo:/etc/passwd"}, r"tokenizer\.merge_file: 'nemo:/etc/passwd' is not a file"),
        ({"vocab_file": "nemo:../../etc/passwd"}, r"tokenizer\.vocab_file: .* is not a file of the archive"),
    ],
)
def test_other_tokenizers_are_refused_by_name(read, changes, message):
    settings = {**SETTINGS, "tokenizer": {**SETTINGS["tokenizer"], **changes}}
    with pytest.raises(ModelError, match=rf"megatron\.nemo: model_config\.yaml: {message}"):
        read(members(settings))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (VOCAB_FILE, b"{", "is not JSON"),
        (VOCAB_FILE, b"[" * 100_000, "is not JSON"),
        (VOCAB_FILE, b'{"a": 0}', "expected 256 to"),
        (VOCAB_FILE, json.dumps({**VOCABULARY, "x!": 999}).encode(), "expected each id from 0 to 261 exactly once"),
        (VOCAB_FILE, json.dumps({**VOCABULARY, "x!": "7"}).encode(), "expected each id from 0 to"),
        (VOCAB_FILE, b"\xff\xfe", "is not text"),
        (MERGES_FILE, b"i n g\n", "line 1: expected two tokens"),
        (MERGES_FILE, b"q qq\n", "does not fit the vocabulary"),
    ],
)
def test_broken_tokenizer_files_are_named(read, name, content, message):
    with pytest.raises(ModelError, match=rf"megatron\.nemo: {name}:? {message}"):
        read({**members(SETTINGS), name: content})


def test_a_vocabulary_without_the_end_of_text_or_a_byte_is_refused(read):
    for lost in ("<|endoftext|>", "Ġ"):
        tokens = [token for token in VOCABULARY if token != lost]
        content = json.dumps({token: index for index, token in enumerate(tokens)}).encode()
        with pytest.raises(ModelError, match=rf"{VOCAB_FILE}: has no '{lost}'".replace("|", r"\|")):
            read({**members(SETTINGS), VOCAB_FILE: content})
