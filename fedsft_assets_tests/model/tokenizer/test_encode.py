"""Tokens of prompts and answers: one text for the model's own tokenizer, in which nothing becomes a control token."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedsft_assets.data.records import Record, read_records
from fedsft_assets.data.splits import split_dataset
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.prompt_template import template
from fedsft_assets.model.text_generation import plain_tokens
from fedsft_assets.model.tokenizer.description import words_end_at_spaces
from fedsft_assets.model.tokenizer.encode import TextEncoder
from fedsft_assets.model.training.batches import tokenize
from fedsft_assets.model.training.local_training import split_tokens
from fedsft_assets.store import SPLITS, split_file
from fedsft_assets_tests.model.hf_tokenizers import CONTROLS, KINDS, hf_tokenizer
from fedsft_assets_tests.shipped import DATASETS

_FRONTS = {
    **{kind: [] for kind in ("tiny", "smollm2", "with added tokens", "as Qwen's")},
    "as GLM's": ["[gMASK]", "<sop>"],
}
_ODD = [
    ("What is it?", "gold"),
    ("ends with blanks  ", "  begins with them"),
    ("", "an answer to nothing"),
    ("an answer of nothing to", ""),
    ("ends in a line\n\n", "\n begins with one"),
    ("Grüße, 世界 🙂 ﬁ", "\u0301 世界\x00 "),
    ("(punctuation:", ") ends, and begins ..."),
    ("what follows the <tool_call>", " answer answers<tool_call>is an answer"),
    ("an answer", " answer<tool_call> answer"),
]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tokenizer(kind: str) -> Any:
    return hf_tokenizer(kind)


@pytest.fixture(scope="module")
def real_records(real_samples: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    folder = tmp_path_factory.mktemp("real")
    records: list[Record] = []
    for name, dataset in DATASETS.items():
        split_dataset(dataset, real_samples / dataset.folder, folder / name)
        records += [record for split in SPLITS for record in read_records(split_file(folder / name, split))[:60]]
    return records


def _own(tokenizer: Any, text: str) -> list[int]:
    """What Hugging Face's tokenizer itself makes of a text that has no control token in it."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("style", ["answer", "nemo"])
def test_a_record_has_the_tokens_of_its_whole_text(
    tokenizer: Any, kind: str, style: str, real_records: list[Record]
) -> None:
    texts = [
        (template(style).prompt(record["input"]), template(style).answer(record["output"])) for record in real_records
    ]
    encoder = TextEncoder.of(tokenizer)
    spanning = 0
    for (prompt, answer), (ids, count) in zip(texts, encoder.records(*zip(*texts, strict=True)), strict=True):
        alone, whole = _own(tokenizer, prompt), _own(tokenizer, prompt + answer)
        assert ids[:count] == alone
        if whole[: len(alone)] == alone:
            assert ids == whole
        else:
            spanning += 1
    assert len(texts) > 300
    if kind == "of words across spaces":
        assert spanning > 10
    else:
        assert spanning == 0


def test_odd_texts_have_the_tokens_of_the_whole_too(tokenizer: Any) -> None:
    encoder = TextEncoder.of(tokenizer)
    for (prompt, answer), (ids, count) in zip(_ODD, encoder.records(*zip(*_ODD, strict=True)), strict=True):
        alone, whole = _own(tokenizer, prompt), _own(tokenizer, prompt + answer)
        assert ids[:count] == alone
        assert encoder.prompts([prompt]) == [alone]
        if whole[: len(alone)] == alone:
            assert ids == whole


def test_an_answer_after_a_token_that_would_span_the_border_goes_on_where_the_prompt_ended() -> None:
    bpe = Tokenizer(
        models.BPE({"▁": 0, "a": 1, "b": 2, "c": 3, "▁a": 4, "bc": 5, "▁b": 6}, [("▁", "a"), ("b", "c"), ("▁", "b")])
    )
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    encoder = TextEncoder(bpe.to_str().encode())
    assert bpe.encode("abc").tokens == ["▁a", "bc"]
    assert list(encoder.records(["ab"], ["c b"])) == [([4, 2, 3, 6], 2)]  # and no "▁" between b and c


def test_an_answer_gets_no_dummy_prefix(kind: str) -> None:
    """Which for SentencePiece would be a "▁" that an answer generated after the prompt does not begin with."""
    tokenizer = hf_tokenizer(kind)
    [record] = tokenize([{"input": "What is it?", "output": "What is it"}], tokenizer, 64)
    answer = tokenizer.convert_ids_to_tokens(record.ids[record.prompt :])
    assert "".join(answer).replace("Ġ", "▁").count("▁") in (0, 3)  # one for each word, if for any


def test_what_a_tokenizer_puts_before_a_text_is_before_every_record_and_prompt(kind: str, tokenizer: Any) -> None:
    expected = tokenizer.convert_tokens_to_ids(_FRONTS.get(kind, ["<s>"]))
    encoder = TextEncoder.of(tokenizer)
    assert encoder.front == expected
    [whole] = tokenize([{"input": "x", "output": "y"}], tokenizer, 64)
    [cut] = tokenize([{"input": "x y " * 90, "output": "y"}], tokenizer, 12)
    for record in (whole, cut):
        assert record.ids[: len(expected)] == expected
        assert record.ids.count(tokenizer.eos_token_id) == 1
    assert len(cut) == 12
    assert plain_tokens(encoder, "x", "answer") == whole.ids[: whole.prompt]


def test_a_control_token_that_is_spelled_out_in_a_record_is_text(kind: str, tokenizer: Any) -> None:
    special = {*tokenizer.all_special_tokens, *_FRONTS.get(kind, CONTROLS)}
    encoder = TextEncoder.of(tokenizer)
    texts = [form for token in special for form in (token, f"a {token} b", f"a{token}b", f"{token}{token}")]
    prompts = [f"x {text}" for text in texts]
    answers = [f" {text}" for text in texts]
    controls = {tokenizer.convert_tokens_to_ids(token) for token in special} - {tokenizer.unk_token_id}
    for ids, _ in encoder.records(prompts, answers):
        assert controls.isdisjoint(ids)
    for ids in encoder.prompts(texts):
        assert controls.isdisjoint(ids)


def test_a_control_token_that_merges_skip_is_text_too() -> None:
    """With `ignore_merges`, as Llama 3's, a word that is in the vocabulary is taken whole."""
    bpe = Tokenizer(models.BPE({"E": 0, "O": 1, "S": 2, "EOS": 3, " ": 4}, [], ignore_merges=True))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="EOS")
    assert bpe.encode("EOS", add_special_tokens=False).ids == [3]
    assert TextEncoder.of(tokenizer).prompts(["EOS"]) == [[0, 1, 2]]


def test_ids_of_added_tokens_stay_where_controls_are_kept_out() -> None:
    tokenizer = hf_tokenizer("Unigram")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.add_tokens(["[tool]"])
    encoder = TextEncoder.of(tokenizer)
    assert tokenizer.convert_tokens_to_ids("[tool]") in encoder.prompts(["a [tool] b"])[0]
    assert tokenizer.convert_tokens_to_ids("<turn>") not in encoder.prompts(["a <turn> b"])[0]


def test_a_character_that_is_a_special_token_stays_in_texts() -> None:
    """Some pad with "!", which answers need all the same."""
    tokenizer = hf_tokenizer("tiny")
    tokenizer.add_special_tokens({"pad_token": "!"})
    assert TextEncoder.of(tokenizer).prompts(["Stop!"]) == [_own(hf_tokenizer("tiny"), "Stop!")]


def test_prompts_are_encoded_once_where_words_end_at_spaces() -> None:
    said = {
        kind: json.loads(hf_tokenizer(kind).backend_tokenizer.to_str())
        for kind in ("tiny", "as Llama 2's", "as Qwen's", "Unigram")
    }
    assert all(map(words_end_at_spaces, said.values()))


@pytest.mark.parametrize("kind", ["with added tokens", "of words across spaces", "WordLevel", "WordPiece"])
def test_whole_texts_are_encoded_where_that_is_not_sure(kind: str) -> None:
    assert not words_end_at_spaces(json.loads(hf_tokenizer(kind).backend_tokenizer.to_str()))


@pytest.mark.parametrize("pattern", [r"\w+(?= )|.", r"\w+$|.", r"\w+\b|."])
def test_whole_texts_are_encoded_where_words_look_around(pattern: str) -> None:
    tokenizer = hf_tokenizer("as Llama 2's").backend_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    assert not words_end_at_spaces(json.loads(tokenizer.to_str()))


def test_a_word_that_no_token_stands_for_is_refused() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    with pytest.raises(ModelError, match=r"tokenizer\.json: cannot encode a text: .*UNK"):
        TextEncoder(words.to_str().encode()).prompts(["a b"])


@pytest.mark.parametrize("kind", ["as Llama 2's", "Unigram"])
def test_an_answer_that_a_model_knows_has_the_loss_of_the_whole_text(kind: str, tmp_path: Path) -> None:
    """Training sees prompt and answer as transformers tokenizes them in one piece."""
    tokenizer = hf_tokenizer(kind)
    record = {"input": "What is the capital of France?", "output": "Paris is the capital."}
    whole = tokenizer(f"{record['input']}\n\nAnswer: {record['output']}")["input_ids"]
    torch.manual_seed(1)
    config = LlamaConfig(
        **{"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "max_position_embeddings": 64, "eos_token_id": tokenizer.eos_token_id},
    )
    lm = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=0.01)
    for _ in range(60):
        loss = lm(input_ids=torch.tensor([whole]), labels=torch.tensor([whole])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model = LanguageModel.wrap(lm, tokenizer, max_length=64)
    records_file = tmp_path / "training.jsonl"
    records_file.write_text(json.dumps(record) + "\n")
    [tokens] = split_tokens(model, records_file, 64)
    assert tokens.ids == whole
    with torch.no_grad():
        labels = [-100] * tokens.prompt + tokens.ids[tokens.prompt :]
        assert lm(input_ids=torch.tensor([tokens.ids]), labels=torch.tensor([labels])).loss < 0.1
    assert model.generate([record["input"]]) == [record["output"]]
