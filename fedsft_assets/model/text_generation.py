"""Answers of a Hugging Face causal language model: to many prompts at once, or to one, piece by piece.

Transformers' `generate` makes the tokens. Of the model's own settings for it only the EOS tokens count: none of
sampling, penalties, forced or suppressed tokens, lengths and caches, so that models are compared by the same rules.
Nothing here switches the model to evaluation mode or moves it: the caller does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation import BaseStreamer

from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.generation_settings import GenerationSettings, end_tokens
from fedsft_assets.model.prompt_template import template
from fedsft_assets.model.tokenizer.encode import TextEncoder, front_tokens
from fedsft_assets.model.trial import position_limit

_UNFINISHED = "\ufffd"  # what a part of a character's bytes decodes to


@dataclass(frozen=True)
class ChatTurn:
    """What one side of a conversation said."""

    role: Literal["system", "user", "assistant"]
    text: str


def plain_tokens(encoder: TextEncoder, text: str, prompt_template: str) -> list[int]:
    """The tokens of a prompt as in training: in the template of that name, and nothing in it is a special token."""
    return encoder.front + encoder.prompts([template(prompt_template).prompt(text)])[0]


def chat_tokens(tokenizer: Any, turns: Sequence[ChatTurn], room: int | None = None) -> list[int]:
    """The tokens of a conversation, up to where the assistant's next turn begins, by the tokenizer's chat template.

    If they are more than `room`, the oldest turns are left out, a question always together with its answer; what
    the system says first stays. Raises ModelError if the tokenizer has no template, if the template refuses the
    turns, or if the last turn alone does not fit.
    """
    if not tokenizer.chat_template:
        raise ModelError(f"{type(tokenizer).__name__}: the tokenizer has no chat template; use a plain prompt")
    first = turns[:1] if turns and turns[0].role == "system" else []
    said = list(turns[len(first) :])
    while True:
        messages = [{"role": turn.role, "content": turn.text} for turn in [*first, *said]]
        try:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        except TemplateError as error:
            raise ModelError(f"the tokenizer's chat template refuses this conversation: {error}") from error
        if room is None or len(ids) <= room:
            return ids
        if len(said) < 3:
            raise ModelError(
                f"the last message alone makes {len(ids)} tokens, and the model has room for {room} before its answer; "
                "shorten it, or ask for fewer new tokens"
            )
        said = said[2:]


def prompt_room(lm: Any, settings: GenerationSettings) -> int | None:
    """How many tokens a prompt can have, so that the answer fits too; None if the model has no limit."""
    positions = _positions(lm)
    return positions - _most_new_tokens(positions, settings) if positions else None


def complete(
    lm: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    settings: GenerationSettings,
    *,
    batch_size: int = 16,
    use_cache: bool = True,
) -> list[str]:
    """What the model appends to each prompt, given as tokens: text without EOS, special tokens and outer blanks.

    An answer has at most half of the model's positions. A prompt that leaves no room for it loses its beginning,
    but not what its tokenizer puts before every text. Prompts are read in batches, padded on the left. Raises
    ModelError for a prompt without tokens, and if the model gives no numbers.
    """
    prompts = _fitted(lm, tokenizer, prompts, settings)
    ends, seeds = _end_tokens(lm, tokenizer), _seeds(settings, len(prompts))
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch, batch_seeds = [prompts[index] for index in chosen], [seeds[index] for index in chosen]
        rows = _generate(lm, tokenizer, batch, settings, batch_seeds, use_cache=use_cache)
        for index, row in zip(chosen, rows, strict=True):
            answers[index] = _decode(tokenizer, list(takewhile(lambda token: token not in ends, row))).strip()
    return answers


def stream(
    lm: Any, tokenizer: Any, prompt: list[int], settings: GenerationSettings, write: Callable[[str], None]
) -> None:
    """Hand the same answer to one prompt to `write` in pieces, each as soon as its characters are whole.

    An error of `write` ends the work; other errors as of `complete`.
    """
    prompts = _fitted(lm, tokenizer, [prompt], settings)
    pieces = _Pieces(tokenizer, _end_tokens(lm, tokenizer), write)
    _generate(lm, tokenizer, prompts, settings, _seeds(settings, 1), streamer=pieces)


class _Pieces(BaseStreamer):
    """Hands the text of tokens on, without outer blanks and without parts of characters."""

    def __init__(self, tokenizer: Any, ends: set[int], write: Callable[[str], None]) -> None:
        self._tokenizer, self._ends, self._write = tokenizer, ends, write
        self._ids: list[int] = []
        self._written = 0

    def put(self, value: Tensor) -> None:
        """Take the prompt [1, T], which is no part of the answer, then every new token [1]."""
        if value.ndim > 1 or int(value) in self._ends:
            return
        self._ids.append(int(value))
        # Blanks wait for what follows: at the end of an answer they are not part of it.
        self._hand_on(self._text().rstrip(_UNFINISHED).rstrip())

    def end(self) -> None:
        """Hand on what is left; nothing can complete a character any more."""
        self._hand_on(self._text().rstrip())

    def _text(self) -> str:
        return _decode(self._tokenizer, self._ids).lstrip()

    def _hand_on(self, text: str) -> None:
        if len(text) > self._written:
            self._write(text[self._written :])
            self._written = len(text)


class _Choice(LogitsProcessor):
    """Of the logits [B, V] of B answers, leaves those of tokens, or of the one that was drawn for each answer.

    Each draws from a generator of its own. Raises ModelError if the logits are not finite numbers.
    """

    def __init__(self, no_token: Tensor, settings: GenerationSettings, seeds: Sequence[int]) -> None:
        """`no_token`, bool [V], says which logits stand for no token; `seeds` has one seed for each answer."""
        self._no_token = no_token
        self._warpers = _warpers(settings)
        self._generators = [torch.Generator(no_token.device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.masked_fill(self._no_token, -torch.inf)
        likeliest = scores.amax(dim=-1, keepdim=True)
        if not likeliest.isfinite().all():
            raise ModelError("the model's logits are not finite numbers: its weights are broken, or training diverged")
        if not self._warpers:
            return scores
        # With 0 as the highest, no temperature is so low that anything overflows.
        probabilities = self._warpers(input_ids, scores - likeliest).softmax(dim=-1)
        drawn = [
            torch.multinomial(row, 1, generator=generator)
            for row, generator in zip(probabilities, self._generators, strict=True)
        ]
        return torch.full_like(scores, -torch.inf).scatter(1, torch.stack(drawn), 0.0)


def _generate(
    lm: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    settings: GenerationSettings,
    seeds: list[int],
    *,
    use_cache: bool = True,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """The new tokens of each of B prompts; after EOS there may be others, for as long as other answers go on."""
    width = max(map(len, prompts))
    gaps = [width - len(prompt) for prompt in prompts]
    pad = tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * gap + prompt for gap, prompt in zip(gaps, prompts, strict=True)], device=lm.device)
    mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps], device=lm.device)
    first = _first_position(lm)
    config = GenerationConfig(
        max_new_tokens=_most_new_tokens(_positions(lm), settings),
        do_sample=False,  # `_Choice` draws: `generate` would draw for all answers from one generator
        use_cache=use_cache,
        eos_token_id=list(_end_tokens(lm, tokenizer)) or None,
        pad_token_id=pad,
    )
    # `generate` takes from the model's settings what it is not told here.
    own, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        rows = lm.generate(
            ids,
            attention_mask=mask,
            # `generate` itself counts from 0.
            position_ids=first + (mask.cumsum(dim=1) - 1).clamp(min=0) if first else None,
            generation_config=config,
            logits_processor=LogitsProcessorList([_Choice(_no_token(lm, tokenizer), settings, seeds)]),
            streamer=streamer,
        )
    finally:
        lm.generation_config = own
    return rows[:, width:].tolist()


def _warpers(settings: GenerationSettings) -> LogitsProcessorList:
    """What sampling does to logits, in the order of Hugging Face's `generate`."""
    warpers = LogitsProcessorList()
    if settings.temperature:
        warpers.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k:
            warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            warpers.append(TopPLogitsWarper(settings.top_p))
    return warpers


def _positions(lm: Any) -> int | None:
    """How many tokens a prompt and its answer can have together; None if the model has no limit."""
    limit = position_limit(lm.config.get_text_config())
    return limit - _first_position(lm) if limit else None


def _first_position(lm: Any) -> int:
    """The position of a text's first token: 0, but in RoBERTa's kin that after the one of padding."""
    tables = [module for name, module in lm.named_modules() if name.endswith("position_embeddings")]
    padding = [table.padding_idx for table in tables if isinstance(table, nn.Embedding)]
    return max((index + 1 for index in padding if index is not None), default=0)


def _most_new_tokens(positions: int | None, settings: GenerationSettings) -> int:
    """An answer gets half of the model's positions at the most, or a question might not be left."""
    return min(settings.max_new_tokens, positions // 2) if positions else settings.max_new_tokens


def _fitted(lm: Any, tokenizer: Any, prompts: Sequence[list[int]], settings: GenerationSettings) -> list[list[int]]:
    """The prompts with as much of their end as there is room for."""
    if not all(prompts):
        raise ModelError("a prompt has no tokens; give it some text")
    room = prompt_room(lm, settings)
    if room is None:
        return list(prompts)
    front = front_tokens(tokenizer.backend_tokenizer)
    fitted = []
    for prompt in prompts:
        kept = front if prompt[: len(front)] == front else []
        fitted.append(prompt if len(prompt) <= room else kept + prompt[len(prompt) - room + len(kept) :])
    return fitted


def _seeds(settings: GenerationSettings, count: int) -> list[int]:
    if settings.seed is not None:
        return [settings.seed] * count
    return torch.randint(1 << 62, (count,)).tolist() if settings.temperature else [0] * count


def _end_tokens(lm: Any, tokenizer: Any) -> set[int]:
    """All that the tokenizer and the model call EOS; a chat model has one for a turn and one for a text."""
    return set(end_tokens(tokenizer.eos_token_id, lm.config.eos_token_id, lm.generation_config.eos_token_id))


def _no_token(lm: Any, tokenizer: Any) -> Tensor:
    """Which of the model's V logits stand for no token, bool [V]: vocabularies are often padded to a round number."""
    logits = torch.arange(lm.get_output_embeddings().weight.shape[0])
    return ~torch.isin(logits, torch.tensor(list(tokenizer.get_vocab().values()))).to(lm.device)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    """The text of tokens as they are: no blank before punctuation is taken away afterwards."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
