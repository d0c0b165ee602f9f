"""Answers: the same with and without the cache, alone and in a batch, whole and in pieces; and where they end."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.generation_settings import GenerationSettings
from fedsft_assets.model.text_generation import ChatTurn, chat_tokens, complete, plain_tokens, prompt_room, stream
from fedsft_assets.model.tokenizer.encode import TextEncoder, front_tokens
from fedsft_assets.model.tokenizer.tiny import EOS, tiny_tokenizer
from fedsft_assets_tests.model.small_models import CONFIGS, INFINITE, MAMBA, small_model

POSITIONS = 96
GREEDY = GenerationSettings(max_new_tokens=40)
SAMPLED = GenerationSettings(max_new_tokens=20, temperature=1.0, seed=3)
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ANSWERS = {
    "what is the colour of grass?": "grass is green",
    "say it: what is the colour of snow?": "snow is white, and cold",
    "now tell me, since I would really like to know, what flies?": "a 🚀 does, 日本 says, über all",
    "blood?": "red",
}
QUESTIONS = list(ANSWERS)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    bpe = tiny_tokenizer([f"{question}\n\nAnswer: {answer}" for question, answer in ANSWERS.items()])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=EOS)


@pytest.fixture(params=["gpt2", "llama"])
def lm(request: pytest.FixtureRequest, tokenizer: Any) -> Any:
    """A random model, with learned positions or with rotary ones."""
    return _random(request.param, len(tokenizer))


def _random(kind: str, vocabulary: int, **changes: Any) -> Any:
    torch.manual_seed(5)
    common = {"vocab_size": vocabulary, "eos_token_id": 0, "bos_token_id": 0, **changes}
    if kind == "gpt2":
        config = GPT2Config(n_positions=POSITIONS, n_layer=2, n_embd=48, n_head=3, initializer_range=0.3, **common)
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        **{"max_position_embeddings": POSITIONS, "hidden_size": 48, "num_hidden_layers": 2, "initializer_range": 0.3},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64, **common},
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def trained(tokenizer: Any) -> Any:
    """A model that knows its answers by heart."""
    lm = _random("gpt2", len(tokenizer), resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3)
    records = []
    for question, answer in ANSWERS.items():
        prompt = plain_tokens(TextEncoder.of(tokenizer), question, "answer")
        learned = [*tokenizer(f" {answer}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        records.append((torch.tensor([prompt + learned]), torch.tensor([[-100] * len(prompt) + learned])))
    for _ in range(150):
        for ids, labels in records:
            lm(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return lm


def _prompts(tokenizer: Any, texts: list[str] = QUESTIONS) -> list[list[int]]:
    encoder = TextEncoder.of(tokenizer)
    return [plain_tokens(encoder, text, "answer") for text in texts]


def _pieces(lm: Any, tokenizer: Any, prompt: list[int], settings: GenerationSettings) -> list[str]:
    pieces: list[str] = []
    stream(lm, tokenizer, prompt, settings, pieces.append)
    return pieces


@contextmanager
def _widths_read(lm: Any) -> Iterator[list[int]]:
    """How many tokens of a row each call of the model is given."""
    widths: list[int] = []
    handle = lm.register_forward_pre_hook(
        lambda _, __, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        yield widths
    finally:
        handle.remove()


def test_a_memorized_answer_comes_back_and_stops_at_eos(trained: Any, tokenizer: Any) -> None:
    assert complete(trained, tokenizer, _prompts(tokenizer), GREEDY) == list(ANSWERS.values())
    assert complete(trained, tokenizer, _prompts(tokenizer), GREEDY, batch_size=1) == list(ANSWERS.values())


def test_a_batch_ends_when_its_last_answer_does(trained: Any, tokenizer: Any) -> None:
    with _widths_read(trained) as widths:
        complete(trained, tokenizer, _prompts(tokenizer), GREEDY)
    longest = max(len(tokenizer(f" {answer}")["input_ids"]) for answer in ANSWERS.values())
    assert len(widths) == longest + 1  # and its EOS


def test_greedy_answers_are_those_of_hugging_faces_generate(lm: Any, tokenizer: Any) -> None:
    for prompt in _prompts(tokenizer):
        expected = lm.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=30,
            do_sample=False,
            pad_token_id=0,
        )[0, len(prompt) :]
        [answer] = complete(lm, tokenizer, [prompt], replace(GREEDY, max_new_tokens=30))
        assert answer == tokenizer.decode(expected, skip_special_tokens=True).strip()


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_answers_are_the_same_with_and_without_the_cache(lm: Any, tokenizer: Any, settings: GenerationSettings) -> None:
    prompts = _prompts(tokenizer)
    with _widths_read(lm) as cached:
        answers = complete(lm, tokenizer, prompts, settings)
    with _widths_read(lm) as uncached:
        assert complete(lm, tokenizer, prompts, settings, use_cache=False) == answers
    assert any(answers)
    longest = max(map(len, prompts))
    assert cached == [longest] + [1] * (len(cached) - 1)
    assert uncached == list(range(longest, longest + len(uncached)))


@torch.no_grad()
def _reread(lm: Any, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens after a prompt; all is read again for each of them, as in training."""
    ids = torch.tensor([prompt])
    for _ in range(count):
        ids = torch.cat([ids, lm(input_ids=ids, use_cache=False).logits[:, -1:].argmax(dim=-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", CONFIGS)
def test_models_of_all_kinds_answer_in_a_padded_batch_as_they_were_trained(kind: str, tokenizer: Any) -> None:
    lm = small_model(kind, tokenizer)
    lm.config.eos_token_id = lm.generation_config.eos_token_id = None
    prompts = [prompt[-length:] for prompt, length in zip(_prompts(tokenizer), (5, 14, 9, 11), strict=True)]
    settings = GenerationSettings(max_new_tokens=10)
    expected = [tokenizer.decode(_reread(lm, prompt, 10), skip_special_tokens=True).strip() for prompt in prompts]
    assert complete(lm, tokenizer, prompts, settings) == expected
    assert [complete(lm, tokenizer, [prompt], settings)[0] for prompt in prompts] == expected


@pytest.mark.parametrize("kind", [*MAMBA, *INFINITE])
def test_a_state_space_model_reads_each_token_once(kind: str, tokenizer: Any) -> None:
    with _widths_read(lm := small_model(kind, tokenizer)) as widths:
        complete(lm, tokenizer, _prompts(tokenizer)[:1], GenerationSettings(max_new_tokens=5))
    assert widths[1:] == [1] * (len(widths) - 1)


def test_roberta_has_fewer_positions_than_its_table_and_no_prompt_leaves_them(tokenizer: Any) -> None:
    lm = small_model("roberta", tokenizer, max_position_embeddings=32)
    settings = GenerationSettings(max_new_tokens=10)
    assert prompt_room(lm, settings) == 32 - 2 - 10
    prompt = plain_tokens(TextEncoder.of(tokenizer), "snow " * 100, "answer")
    assert complete(lm, tokenizer, [prompt], settings) == complete(lm, tokenizer, [prompt[-20:]], settings)


def test_the_models_own_settings_for_generation_do_not_count(lm: Any, tokenizer: Any) -> None:
    prompts = _prompts(tokenizer)
    answers = complete(lm, tokenizer, prompts, GREEDY)
    taken = int(tokenizer(answers[0])["input_ids"][0])
    own = GenerationConfig(
        **{"do_sample": True, "num_beams": 2, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "max_length": 7},
        **{"suppress_tokens": [taken], "begin_suppress_tokens": [taken], "forced_eos_token_id": 0, "max_time": 1e-9},
        **{"min_new_tokens": 30, "stop_strings": "a", "token_healing": True, "cache_implementation": "static"},
        eos_token_id=lm.config.eos_token_id,
    )
    lm.generation_config = own
    assert complete(lm, tokenizer, prompts, GREEDY) == answers
    assert "".join(_pieces(lm, tokenizer, prompts[0], GREEDY)) == answers[0]
    assert lm.generation_config is own


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_an_answer_does_not_depend_on_the_other_prompts(
    trained: Any, lm: Any, tokenizer: Any, settings: GenerationSettings
) -> None:
    prompts = _prompts(tokenizer)
    for model in (trained, lm):  # the one ends its answers, at different lengths
        together = complete(model, tokenizer, prompts, settings)
        assert together == [complete(model, tokenizer, [prompt], settings)[0] for prompt in prompts]
        assert together[::-1] == complete(model, tokenizer, prompts[::-1], settings, batch_size=3)
        assert len(set(together)) > 1


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_pieces_of_a_stream_make_up_the_answer(
    trained: Any, lm: Any, tokenizer: Any, settings: GenerationSettings
) -> None:
    for model in (trained, lm):
        for prompt in _prompts(tokenizer):
            pieces = _pieces(model, tokenizer, prompt, settings)
            assert ["".join(pieces)] == complete(model, tokenizer, [prompt], settings)


def test_no_piece_of_a_stream_ends_within_a_character(trained: Any, tokenizer: Any) -> None:
    pieces = _pieces(trained, tokenizer, _prompts(tokenizer)[2], GREEDY)
    assert "".join(pieces) == ANSWERS[QUESTIONS[2]]
    assert len(tokenizer("🚀")["input_ids"]) > 1
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 5


def test_a_reader_that_has_enough_of_a_stream_ends_the_work(trained: Any, tokenizer: Any) -> None:
    pieces: list[str] = []

    def stop_at_once(piece: str) -> None:
        pieces.append(piece)
        raise BrokenPipeError

    own = trained.generation_config
    with _widths_read(trained) as widths, pytest.raises(BrokenPipeError):
        stream(trained, tokenizer, _prompts(tokenizer)[1], GREEDY, stop_at_once)
    assert len(pieces) == 1
    assert ANSWERS[QUESTIONS[1]].startswith(pieces[0])
    assert len(widths) <= 3
    assert torch.is_grad_enabled()
    assert trained.generation_config is own


def test_every_eos_of_the_model_ends_an_answer(lm: Any, tokenizer: Any) -> None:
    [prompt] = _prompts(tokenizer, ["blood?"])
    ids = lm.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0, len(prompt) :]
    fourth = int(ids[3])
    first = ids.tolist().index(fourth)
    lm.generation_config.eos_token_id = [0, fourth]
    [answer] = complete(lm, tokenizer, [prompt], GREEDY)
    assert answer == tokenizer.decode(ids[:first]).strip()
    assert "".join(_pieces(lm, tokenizer, prompt, GREEDY)) == answer


def test_an_answer_is_cut_at_max_new_tokens(trained: Any, tokenizer: Any) -> None:
    prompts = _prompts(tokenizer)[1:2]
    [whole] = complete(trained, tokenizer, prompts, GREEDY)
    [cut] = complete(trained, tokenizer, prompts, GenerationSettings(max_new_tokens=2))
    assert whole.startswith(cut)
    assert len(cut) < len(whole)


def test_a_prompt_longer_than_the_model_reads_loses_its_beginning(lm: Any, tokenizer: Any) -> None:
    prompt = plain_tokens(TextEncoder.of(tokenizer), "snow is white. " * 200 + QUESTIONS[0], "answer")
    room = prompt_room(lm, GREEDY)
    assert room == POSITIONS - GREEDY.max_new_tokens
    assert complete(lm, tokenizer, [prompt], GREEDY) == complete(lm, tokenizer, [prompt[-room:]], GREEDY)


def test_a_cut_prompt_keeps_its_bos_token(lm: Any, tokenizer: Any) -> None:
    bpe = tiny_tokenizer([])
    bpe.add_special_tokens(["<s>"])
    bos = bpe.token_to_id("<s>")
    bpe.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    with_bos = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token=EOS, pad_token=EOS)
    assert front_tokens(bpe) == [bos]
    prompt = plain_tokens(TextEncoder.of(with_bos), "snow " * 200, "answer")
    assert prompt[0] == bos
    assert prompt.count(bos) == 1
    assert len(tokenizer) > bos  # so that the model has an embedding for it
    room = prompt_room(lm, GREEDY)
    cut = [bos, *prompt[1 - room :]]
    assert len(cut) == room
    assert complete(lm, with_bos, [prompt], GREEDY) == complete(lm, with_bos, [cut], GREEDY)


def test_a_question_keeps_half_of_the_window_however_long_the_answer_may_be(lm: Any, tokenizer: Any) -> None:
    settings = GenerationSettings(max_new_tokens=1000)
    assert prompt_room(lm, settings) == POSITIONS // 2
    prompt = plain_tokens(TextEncoder.of(tokenizer), "snow " * 300, "answer")
    with _widths_read(lm) as widths:
        complete(lm, tokenizer, [prompt], settings)
    assert widths[0] == POSITIONS // 2
    assert sum(widths) <= POSITIONS


@pytest.mark.parametrize("temperature", [0.0, 50.0])
def test_a_padded_vocabulary_gives_no_tokens(tokenizer: Any, temperature: float) -> None:
    """Logits beyond the tokenizer's vocabulary never win, however high they are."""
    lm = _random("llama", len(tokenizer) + 71, tie_word_embeddings=False)
    with torch.no_grad():
        lm.lm_head.weight[len(tokenizer) :] = 100 * lm.lm_head.weight[: len(tokenizer)].abs().amax(dim=0)
    prompts = _prompts(tokenizer)
    free = lm(input_ids=torch.tensor(prompts[:1])).logits[0, -1]
    assert free.argmax() >= len(tokenizer)
    read: list[int] = []
    handle = lm.register_forward_pre_hook(
        lambda _, __, kwargs: read.extend(kwargs["input_ids"].flatten().tolist()), with_kwargs=True
    )
    complete(lm, tokenizer, prompts, GenerationSettings(40, temperature, seed=1))
    handle.remove()
    assert max(read) < len(tokenizer)


def test_a_seed_makes_sampled_answers_repeat(lm: Any, tokenizer: Any) -> None:
    prompts = _prompts(tokenizer)
    assert complete(lm, tokenizer, prompts, SAMPLED) == complete(lm, tokenizer, prompts, SAMPLED)
    assert complete(lm, tokenizer, prompts, SAMPLED) != complete(lm, tokenizer, prompts, replace(SAMPLED, seed=4))


def test_without_a_seed_sampling_follows_torchs_generator(lm: Any, tokenizer: Any) -> None:
    def sample(seed: int) -> list[str]:
        torch.manual_seed(seed)
        return complete(lm, tokenizer, _prompts(tokenizer) * 2, replace(SAMPLED, seed=None))

    assert sample(1) == sample(1) != sample(2)
    answers = sample(1)
    assert answers[: len(QUESTIONS)] != answers[len(QUESTIONS) :]


def test_a_seed_leaves_torchs_generator_alone(lm: Any, tokenizer: Any) -> None:
    before = torch.get_rng_state()
    complete(lm, tokenizer, _prompts(tokenizer), SAMPLED)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("restriction", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-30}])
def test_sampling_from_only_the_likeliest_token_is_greedy(
    lm: Any, tokenizer: Any, restriction: dict[str, float]
) -> None:
    prompts = _prompts(tokenizer)
    settings = replace(SAMPLED, **restriction)
    assert complete(lm, tokenizer, prompts, settings) == complete(
        lm, tokenizer, prompts, replace(GREEDY, max_new_tokens=20)
    )


@pytest.mark.parametrize("restriction", [{}, {"top_k": 3}, {"top_p": 0.5}], ids=["all", "top_k", "top_p"])
def test_tokens_are_drawn_as_often_as_they_are_likely(lm: Any, tokenizer: Any, restriction: dict[str, float]) -> None:
    [prompt] = _prompts(tokenizer, ["blood?"])
    temperature = 4.0
    with torch.no_grad():
        expected = (lm(input_ids=torch.tensor([prompt])).logits[0, -1] / temperature).softmax(dim=0)
    order = expected.argsort(descending=True)
    kept = int((expected[order].cumsum(0) < restriction["top_p"]).sum()) + 1 if "top_p" in restriction else len(order)
    expected[order[int(restriction.get("top_k", kept)) :]] = 0
    expected /= expected.sum()
    settings = GenerationSettings(1, temperature, **restriction)  # type: ignore[arg-type]
    torch.manual_seed(0)
    draws = 4000
    drawn = Counter(complete(lm, tokenizer, [prompt] * draws, settings, batch_size=500))
    likely: Counter[str] = Counter()  # several tokens are parts of characters, which all read the same
    for token in expected.nonzero()[:, 0].tolist():
        likely[tokenizer.decode([token], skip_special_tokens=True).strip()] += float(expected[token])
    assert drawn.keys() <= likely.keys()
    for text, probability in likely.items():
        assert drawn[text] / draws == pytest.approx(probability, abs=0.03), text


def test_broken_weights_are_said_and_not_sampled(lm: Any, tokenizer: Any) -> None:
    with torch.no_grad():
        lm.get_output_embeddings().weight[7] = torch.nan
    for settings in (GREEDY, SAMPLED):
        with pytest.raises(ModelError, match="logits are not finite"):
            complete(lm, tokenizer, _prompts(tokenizer), settings)
        with pytest.raises(ModelError, match="logits are not finite"):
            _pieces(lm, tokenizer, _prompts(tokenizer)[0], settings)


def test_a_prompt_without_tokens_is_refused(lm: Any, tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="no tokens"):
        complete(lm, tokenizer, [[]], GREEDY)


def test_no_prompts_give_no_answers(lm: Any, tokenizer: Any) -> None:
    assert complete(lm, tokenizer, [], GREEDY) == []


def test_a_special_token_in_a_plain_prompt_is_text(tokenizer: Any) -> None:
    assert tokenizer.eos_token_id not in plain_tokens(TextEncoder.of(tokenizer), f"a {EOS} b", "answer")


@pytest.fixture
def chatting(tokenizer: Any) -> Iterator[Any]:
    tokenizer.chat_template = CHAT_TEMPLATE
    yield tokenizer
    tokenizer.chat_template = None


TURNS = [
    ChatTurn("system", "Be brief."),
    *(ChatTurn("assistant" if k % 2 else "user", f"turn {k}") for k in range(6)),
    ChatTurn("user", "the last question"),
]


def test_a_conversation_becomes_tokens_by_the_chat_template(chatting: Any) -> None:
    ids = chat_tokens(chatting, TURNS)
    said = [f"<{turn.role}>{turn.text}{EOS}" for turn in TURNS]
    assert chatting.decode(ids) == "".join(said) + "<assistant>"
    assert ids.count(chatting.eos_token_id) == len(TURNS)


def test_the_oldest_turns_are_left_out_of_a_long_conversation(chatting: Any) -> None:
    whole = chat_tokens(chatting, TURNS)
    assert chat_tokens(chatting, TURNS, room=len(whole)) == whole
    shorter = chat_tokens(chatting, TURNS, room=len(whole) - 1)
    assert shorter == chat_tokens(chatting, [TURNS[0], *TURNS[3:]])
    last = chat_tokens(chatting, [TURNS[0], TURNS[-1]])
    assert chat_tokens(chatting, TURNS, room=len(last)) == last
    without_system = chat_tokens(chatting, TURNS[1:], room=len(chat_tokens(chatting, TURNS[1:])) - 1)
    assert without_system == chat_tokens(chatting, TURNS[3:])


def test_a_last_message_that_does_not_fit_is_refused(chatting: Any) -> None:
    size = len(chat_tokens(chatting, [TURNS[0], TURNS[-1]]))
    with pytest.raises(ModelError, match=rf"last message alone has {size} tokens, .* room for {size - 1} .*shorten"):
        chat_tokens(chatting, TURNS, room=size - 1)


def test_a_tokenizer_without_chat_template_cannot_chat(tokenizer: Any) -> None:
    with pytest.raises(ModelError, match="no chat template; use a plain prompt"):
        chat_tokens(tokenizer, TURNS)


def test_what_a_chat_template_refuses_is_said(chatting: Any) -> None:
    chatting.chat_template = "{{ raise_exception('no system turns, please') }}"
    with pytest.raises(ModelError, match="rejects this conversation: no system turns, please"):
        chat_tokens(chatting, TURNS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("max_new_tokens", 0), ("top_k", -1), ("seed", -1), ("seed", 1 << 63)),
        *(("temperature", value) for value in (-0.1, float("nan"), float("inf"))),
        *(("top_p", value) for value in (0.0, 1.1, float("nan"))),
    ],
)
def test_impossible_settings_are_refused_by_name(field: str, value: float) -> None:
    with pytest.raises(ModelError, match=f"^{field}: expected .*, found {value}$"):
        GenerationSettings(**{field: value})  # type: ignore[arg-type]
