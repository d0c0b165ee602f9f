"""Tokens of a split: those that a tokenizer gives record by record, made once, and kept while they are right."""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, processors
from transformers import LlamaConfig, LlamaForCausalLM

from fedsft_assets.data.records import DataError, Record, dump_records, iterate_records, read_records
from fedsft_assets.data.splits import split_dataset
from fedsft_assets.model.archive.nemo_archive import read_config, read_tokenizer_files
from fedsft_assets.model.base_model import create_base_model
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.preset_tokenizer import preset_tokenizer
from fedsft_assets.model.tokenizer.encode import front_tokens
from fedsft_assets.model.tokenizer.tiny import sample_texts, tiny_tokenizer
from fedsft_assets.model.training import token_cache
from fedsft_assets.model.training.batches import tokenize
from fedsft_assets.model.training.lengths import token_lengths
from fedsft_assets.model.training.token_cache import Tokenized, tokenized
from fedsft_assets.specs.model_preset import model_preset
from fedsft_assets.store import SPLITS, split_file
from fedsft_assets_tests.model.hf_tokenizers import KINDS, hf_tokenizer, skip_without_smollm2
from fedsft_assets_tests.shipped import DATASETS

_ODD = [
    {"input": "say <|endoftext|> and </s>, then <s>", "output": "b<|endoftext|>c</s>"},
    {"input": "", "output": "an answer to nothing"},
    {"input": "What kind of <tool>   tool is What kind of?", "output": "  What kind of tool "},
    {"input": "Grüße, 世界 🙂 ﬁ\u0301\u200b", "output": "\n\n\t世界\x00 "},
    {"input": "snow " * 700, "output": "gold"},
    {"input": "say snow", "output": "snow " * 700},
    {"input": "x", "output": ""},
]
_TEMPLATE = "answer"
# Takes the tokenizer.json from its input; says "making" when it makes tokens itself, and what it has in the end.
_REPORT = """
import hashlib, sys, time
from pathlib import Path
from fedsft_assets.model.training import token_cache
read = token_cache.iterate_records
def announced(records_file):
    print("making", flush=True)
    if sys.argv[2] == "stop":
        time.sleep(600)
    return read(records_file)
token_cache.iterate_records = announced
tokens = token_cache.tokenized(Path(sys.argv[1]), sys.stdin.read().encode(), "answer")
print(hashlib.sha256(b"".join(part.tobytes() for part in (tokens.ids, tokens.starts, tokens.prompts))).hexdigest())
"""
# Root may write into every folder, so it becomes somebody else, who need not be able to get there.
_MAY_NOT_WRITE = """
import os, sys
import fedsft_assets.model.training.token_cache
folder, sys.argv[1] = os.path.split(sys.argv[1])
os.chdir(folder)
if os.getuid() == 0:
    os.setresuid(65534, 65534, 65534)
assert not os.access(".", os.W_OK)
"""


def _split(folder: Path, records: list[dict[str, str]], name: str = "training") -> Path:
    folder.mkdir(exist_ok=True)
    split_file(folder, name).write_bytes(dump_records(records))
    return split_file(folder, name)


def _kept(records_file: Path) -> list[Path]:
    return sorted(records_file.parent.glob(f".tokens-{records_file.stem}-*"))


def _equal(one: Tokenized, other: Tokenized) -> bool:
    pairs = ((one.ids, other.ids), (one.starts, other.starts), (one.prompts, other.prompts))
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def _digest(tokens: Tokenized) -> str:
    return hashlib.sha256(b"".join(part.tobytes() for part in (tokens.ids, tokens.starts, tokens.prompts))).hexdigest()


def _assert_as_tokenize(records_file: Path, tokenizer: Any, template: str, lengths: tuple[int, ...]) -> None:
    made = tokenized(records_file, tokenizer.backend_tokenizer, template)
    kept = tokenized(records_file, tokenizer.backend_tokenizer.to_str().encode(), template)
    assert len(_kept(records_file)) == 1
    records = read_records(records_file)
    front = front_tokens(tokenizer.backend_tokenizer)
    for length in lengths:
        expected = tokenize(records, tokenizer, length, template)
        for tokens in (made, kept):
            assert tokens.records(length, front, tokenizer.eos_token_id) == expected
            assert tokens.records(length, front, tokenizer.eos_token_id, most=3) == expected[:3]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return hf_tokenizer(request.param)


@pytest.fixture(scope="module")
def description() -> bytes:
    """The tiny preset's tokenizer.json."""
    return tiny_tokenizer(sample_texts()).to_str().encode()


@pytest.fixture
def dolly(source: Path, tmp_path: Path) -> Path:
    """The training split of the embedded sample."""
    split_dataset(DATASETS["dolly"], source / DATASETS["dolly"].folder, tmp_path / "dolly")
    return split_file(tmp_path / "dolly", "training")


@pytest.fixture
def make_counts(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The splits whose tokens were made and not read, one entry each time."""
    made: list[Path] = []

    def counted(records_file: Path) -> Iterator[Record]:
        made.append(records_file)
        return iterate_records(records_file)

    monkeypatch.setattr(token_cache, "iterate_records", counted)
    return made


@pytest.mark.parametrize("template", ["answer", "nemo"])
def test_records_are_those_of_the_tokenizer_at_every_length(tokenizer: Any, template: str, tmp_path: Path) -> None:
    records_file = _split(tmp_path / "odd", _ODD)
    _assert_as_tokenize(records_file, tokenizer, template, (3, 8, 20, 64, 1000, 100_000))


def test_records_of_more_than_one_batch_keep_their_order(tokenizer: Any, tmp_path: Path) -> None:
    records = [{"input": f"{number}?", "output": f"{number % 7}"} for number in range(9_000)]
    _assert_as_tokenize(_split(tmp_path / "long", records), tokenizer, _TEMPLATE, (8,))


@pytest.mark.parametrize("dataset", DATASETS)
def test_records_of_real_rows_are_those_of_the_tokenizer(
    tokenizer: Any, dataset: str, real_samples: Path, tmp_path: Path
) -> None:
    split_dataset(DATASETS[dataset], real_samples / DATASETS[dataset].folder, tmp_path / "splits")
    for split in SPLITS:
        _assert_as_tokenize(split_file(tmp_path / "splits", split), tokenizer, _TEMPLATE, (16, 256))


def test_a_tokenizer_that_cuts_and_pads_does_neither_here_and_stays_as_it_is(description: bytes, dolly: Path) -> None:
    tokenizer = Tokenizer.from_buffer(description)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=4000)
    before = tokenizer.to_str()
    cutting = tokenized(dolly, tokenizer, _TEMPLATE)
    assert tokenizer.to_str() == before
    assert not tokenizer.encode_special_tokens
    _kept(dolly)[0].unlink()
    assert _equal(cutting, tokenized(dolly, description, _TEMPLATE))


def test_a_length_without_room_for_a_prompt_is_refused(description: bytes, dolly: Path) -> None:
    tokens = tokenized(dolly, description, _TEMPLATE)
    with pytest.raises(ValueError, match="max_length is 1; expected room for BOS"):
        tokens.records(1, front=[0], eos=0)
    assert {len(record) for record in tokens.records(2, front=[0], eos=0)} == {2}


def test_an_empty_split_has_no_tokens_and_they_are_kept_too(
    description: bytes, tmp_path: Path, make_counts: list[Path]
) -> None:
    empty = _split(tmp_path / "empty", [])
    for _ in range(2):
        tokens = tokenized(empty, description, _TEMPLATE)
        assert tokens.records(64, [], 0) == []
        assert (tokens.ids.shape, tokens.starts.tolist(), tokens.prompts.shape) == ((0,), [0], (0,))
    assert make_counts == [empty]


def test_tokens_are_made_once_for_each_content_tokenizer_and_template(
    description: bytes, dolly: Path, make_counts: list[Path]
) -> None:
    first = tokenized(dolly, description, "answer")
    assert _equal(tokenized(dolly, Tokenizer.from_buffer(description), "answer"), first)
    assert len(make_counts) == 1
    assert len(tokenized(dolly, description, "nemo").ids) < len(first.ids)
    assert len(make_counts) == 2
    other = Tokenizer.from_buffer(description)
    other.add_tokens(["What"])
    assert other.token_to_id("What") in tokenized(dolly, other, "answer").ids
    assert len(make_counts) == 3
    _split(dolly.parent, _ODD)
    assert len(tokenized(dolly, description, "answer").prompts) == len(_ODD)
    assert len(make_counts) == 4


def test_what_decides_no_id_makes_no_other_tokens(description: bytes, dolly: Path, make_counts: list[Path]) -> None:
    tokenized(dolly, description, _TEMPLATE)
    other = Tokenizer.from_buffer(description)
    other.enable_truncation(5)
    other.add_special_tokens(["<pad>"])
    other.post_processor = processors.TemplateProcessing(single="<pad> $A", special_tokens=[("<pad>", 1280)])
    tokenized(dolly, other, _TEMPLATE)
    tokenized(dolly, json.dumps(json.loads(description), indent=1).encode(), _TEMPLATE)
    shutil.copytree(dolly.parent, dolly.parent.with_name("copy"))
    tokenized(dolly.parent.with_name("copy") / dolly.name, description, _TEMPLATE)
    assert make_counts == [dolly]


@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "vocab", "merges", "added_tokens"])
def test_every_part_that_decides_ids_makes_other_tokens(description: bytes, dolly: Path, part: str) -> None:
    tokens = tokenized(dolly, description, _TEMPLATE)
    other = json.loads(description)
    if part == "normalizer":
        other["normalizer"] = {"type": "Lowercase"}
    elif part == "pre_tokenizer":
        other["pre_tokenizer"]["add_prefix_space"] = True
    elif part == "vocab":
        vocab = other["model"]["vocab"]
        vocab["a"], vocab["e"] = vocab["e"], vocab["a"]
    elif part == "merges":
        other["model"]["merges"] = other["model"]["merges"][:-400]
    else:
        other["added_tokens"].append({**other["added_tokens"][0], "id": 1280, "content": "the", "special": False})
    assert not _equal(tokenized(dolly, json.dumps(other).encode(), _TEMPLATE), tokens)
    assert len(_kept(dolly)) == 2


def test_tokens_of_other_contents_and_of_all_but_three_tokenizers_are_removed(description: bytes, dolly: Path) -> None:
    others = [split_file(dolly.parent, name) for name in ("validation", "testing")]
    longer_name = _split(dolly.parent, _ODD, "training-more")
    for path in (*others, longer_name):
        tokenized(path, description, _TEMPLATE)
    newest = []
    for n in range(5):
        tokenizer = Tokenizer.from_buffer(description)
        tokenizer.add_tokens([f"added token {n}"])
        before = set(_kept(dolly))
        tokenized(dolly, tokenizer, _TEMPLATE)
        newest += set(_kept(dolly)) - before - set(_kept(longer_name))
    assert set(_kept(dolly)) - set(_kept(longer_name)) == set(newest[-3:])
    _split(dolly.parent, _ODD)
    tokenized(dolly, description, _TEMPLATE)
    (left,) = set(_kept(dolly)) - set(_kept(longer_name))
    assert left not in newest
    assert [len(_kept(path)) for path in (*others, longer_name)] == [1, 1, 1]


def test_a_damaged_file_is_made_anew(description: bytes, tmp_path: Path) -> None:
    split = _split(tmp_path / "small", _ODD[:4])
    expected = tokenized(split, description, _TEMPLATE)
    (kept,) = _kept(split)
    whole = kept.read_bytes()
    step = len(whole) // 200
    flipped = [whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :] for at in range(0, len(whole), step)]
    cut = [whole[:at] for at in (0, 1, 30, 200, len(whole) // 2, len(whole) - 100, len(whole) - 1)]
    other = [b"\x93NUMPY" + whole, b"not an archive", whole + whole[: len(whole) // 2]]
    for damaged in [*flipped, *cut, *other]:
        kept.write_bytes(damaged)
        assert _equal(tokenized(split, description, _TEMPLATE), expected)
    kept.unlink()
    kept.mkdir()
    assert _equal(tokenized(split, description, _TEMPLATE), expected)


def test_a_file_made_anew_is_read_the_next_time(description: bytes, dolly: Path, make_counts: list[Path]) -> None:
    tokenized(dolly, description, _TEMPLATE)
    (kept,) = _kept(dolly)
    kept.write_bytes(kept.read_bytes()[:-30])
    for _ in range(3):
        tokenized(dolly, description, _TEMPLATE)
    assert len(make_counts) == 2


def test_tokens_of_a_split_that_is_replaced_meanwhile_are_not_kept_as_the_old_ones(
    description: bytes, dolly: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = dolly.read_bytes()

    def replaced_first(records_file: Path) -> Iterator[Record]:
        dolly.with_name("new").write_bytes(dump_records(_ODD))
        dolly.with_name("new").rename(dolly)
        return iterate_records(records_file)

    monkeypatch.setattr(token_cache, "iterate_records", replaced_first)
    assert len(tokenized(dolly, description, _TEMPLATE).prompts) == len(_ODD)
    monkeypatch.undo()
    dolly.write_bytes(old)
    assert len(tokenized(dolly, description, _TEMPLATE).prompts) == len(read_records(dolly))


def test_records_and_tokenizers_that_cannot_be_used_are_refused_by_name(description: bytes, tmp_path: Path) -> None:
    broken = _split(tmp_path / "broken", _ODD)
    broken.write_bytes(broken.read_bytes() + b'{"input": "a"}\n')
    with pytest.raises(DataError, match=rf"broken/training.jsonl: line {len(_ODD) + 1}: output: expected a string"):
        tokenized(broken, description, _TEMPLATE)
    assert _kept(broken) == []
    with pytest.raises(DataError, match=r"none/training\.jsonl: cannot be read: No such file"):
        tokenized(tmp_path / "none" / "training.jsonl", description, _TEMPLATE)
    whole = _split(tmp_path / "whole", _ODD)
    with pytest.raises(ModelError, match=r"tokenizer\.json: cannot be read"):
        tokenized(whole, description[:-10], _TEMPLATE)
    with pytest.raises(ModelError, match="'chat' is not one of answer, nemo"):
        tokenized(whole, description, "chat")


def _start(
    records_file: Path, description: bytes, script: str = _REPORT, stop: bool = False
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", script, str(records_file), "stop" if stop else "go"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    with process.stdin:
        process.stdin.write(description)
    return process


def _printed(process: subprocess.Popen[bytes]) -> list[str]:
    assert process.stdout is not None
    with process:
        printed = process.stdout.read().decode().split()
    assert process.returncode == 0
    return printed


def test_of_processes_that_start_side_by_side_one_makes_the_tokens(description: bytes, tmp_path: Path) -> None:
    split = _split(tmp_path / "large", _ODD * 200)
    printed = [_printed(process) for process in [_start(split, description) for _ in range(3)]]
    expected = _digest(tokenized(split, description, _TEMPLATE))
    assert sorted(printed, key=len) == [[expected], [expected], ["making", expected]]
    assert len(_kept(split)) == 1


def test_a_process_that_dies_while_it_makes_tokens_leaves_the_turn_to_others(description: bytes, dolly: Path) -> None:
    with _start(dolly, description, stop=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"making\n"
        with dolly.open("rb") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        second = _start(dolly, description)
        os.kill(first.pid, signal.SIGKILL)
    assert _printed(second) == ["making", _digest(tokenized(dolly, description, _TEMPLATE))]


def test_where_nothing_can_be_written_tokens_are_made_and_not_kept(description: bytes, dolly: Path) -> None:
    dolly.chmod(0o444)  # for an account that may read and not write, whatever the umask
    dolly.parent.chmod(0o555)
    try:
        printed = [_printed(_start(dolly, description, _MAY_NOT_WRITE + _REPORT)) for _ in range(2)]
        assert _kept(dolly) == []
    finally:
        dolly.parent.chmod(0o755)
    assert printed == [["making", _digest(tokenized(dolly, description, _TEMPLATE))]] * 2


def _tokenizer_json(archive: Path) -> bytes:
    return read_tokenizer_files(archive, read_config(archive))["tokenizer.json"]


@pytest.fixture
def assert_trainers_find(dolly: Path, tmp_path: Path, make_counts: list[Path]) -> Callable[[str], None]:
    """That tokens which the data assets measure with a preset are those that a trainer of its base model reads."""

    def check(name: str) -> None:
        preset = model_preset(name)
        token_lengths(dolly.parent, preset_tokenizer(preset, tmp_path / "cache"))
        assert len(make_counts) == 3
        create_base_model(preset, tmp_path / "base.nemo", 1)
        for split in SPLITS:
            tokenized(split_file(dolly.parent, split), _tokenizer_json(tmp_path / "base.nemo"), _TEMPLATE)
        assert len(make_counts) == 3

    return check


def test_a_trainer_of_the_tiny_model_finds_the_tokens_that_data_assets_made(
    assert_trainers_find: Callable[[str], None],
) -> None:
    assert_trainers_find("tiny")


@pytest.mark.slow
def test_a_trainer_of_smollm2_finds_the_tokens_that_data_assets_made(
    assert_trainers_find: Callable[[str], None],
) -> None:
    skip_without_smollm2()
    assert_trainers_find("smollm2-135m")


@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_of_a_hugging_face_folder_finds_the_tokens_that_data_assets_made(
    kind: str, tmp_path: Path, assert_trainers_find: Callable[[str], None]
) -> None:
    tokenizer = hf_tokenizer(kind)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 3,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "llama")
    assert_trainers_find(str(tmp_path / "llama"))
