"""Text generation with a Hugging Face causal language model: for a batch of prompts, or streamed for one.

Uses transformers' `generate`. Of the model's own generation settings only the EOS tokens apply, not those for sampling,
penalties, forced or suppressed tokens, lengths or caches, so that models are compared by the same rules. The caller
switches the model to evaluation mode and moves it to a device.
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

_UNFINISHED = "\ufffd"  # what an incomplete UTF-8 sequence decodes to


@dataclass(frozen=True)
class ChatTurn:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    text: str


def plain_tokens(encoder: TextEncoder, text: str, prompt_template: str) -> list[int]:
    """The tokens of a prompt as in training: with the named template, and special tokens in `text` as plain text."""
    return encoder.front + encoder.prompts([template(prompt_template).prompt(text)])[0]


def chat_tokens(tokenizer: Any, turns: Sequence[ChatTurn], room: int | None = None) -> list[int]:
    """The tokens of a conversation up to the assistant's next turn, by the tokenizer's chat template.

    If there are more than `room`, the oldest question-answer pairs are dropped; an initial system turn is kept.
    Raises ModelError if the tokenizer has no template, if the template rejects the turns, or if the last turn
    alone does not fit.
    """
    if not tokenizer.chat_template:
        raise ModelError(f"{type(tokenizer).__name__}: the tokenizer has no chat template; use a plain prompt")
    system = turns[:1] if turns and turns[0].role == "system" else []
    rest = list(turns[len(system) :])
    while True:
        messages = [{"role": turn.role, "content": turn.text} for turn in [*system, *rest]]
        try:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        except TemplateError as error:
            raise ModelError(f"the tokenizer's chat template rejects this conversation: {error}") from error
        if room is None or len(ids) <= room:
            return ids
        if len(rest) < 3:
            raise ModelError(
                f"the last message alone has {len(ids)} tokens, but the model has room for {room} before its answer; "
                "shorten it, or request fewer new tokens"
            )
        rest = rest[2:]


def prompt_room(lm: Any, settings: GenerationSettings) -> int | None:
    """The maximum number of prompt tokens that leaves room for the answer; None if the model has no limit."""
    positions = _positions(lm)
    return positions - _max_new_tokens(positions, settings) if positions else None


def complete(
    lm: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    settings: GenerationSettings,
    *,
    batch_size: int = 16,
    use_cache: bool = True,
) -> list[str]:
    """Generate an answer to each tokenized prompt: text without EOS, special tokens and outer white space.

    An answer uses at most half of the model's positions. A prompt that leaves no room for it is truncated at the
    beginning, after the tokens that its tokenizer prepends to every text. Batches are padded on the left. Raises
    ModelError for a prompt without tokens, and if the logits are not finite.
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
    """Generate the same answer for one prompt, and pass it to `write` in pieces as soon as characters are complete.

    Errors of `write` end the generation; other errors are those of `complete`.
    """
    prompts = _fitted(lm, tokenizer, [prompt], settings)
    pieces = _Pieces(tokenizer, _end_tokens(lm, tokenizer), write)
    _generate(lm, tokenizer, prompts, settings, _seeds(settings, 1), streamer=pieces)


class _Pieces(BaseStreamer):
    """Streams the text of tokens, without outer white space and incomplete characters."""

    def __init__(self, tokenizer: Any, ends: set[int], write: Callable[[str], None]) -> None:
        self._tokenizer, self._ends, self._write = tokenizer, ends, write
        self._ids: list[int] = []
        self._written = 0

    def put(self, value: Tensor) -> None:
        """Receive the prompt [1, T], which is ignored, then each new token [1]."""
        if value.ndim > 1 or int(value) in self._ends:
            return
        self._ids.append(int(value))
        # Hold back trailing white space: at the end of an answer it is dropped.
        self._write_up_to(self._text().rstrip(_UNFINISHED).rstrip())

    def end(self) -> None:
        """Write the rest, including characters that stay incomplete."""
        self._write_up_to(self._text().rstrip())

    def _text(self) -> str:
        return _decode(self._tokenizer, self._ids).lstrip()

    def _write_up_to(self, text: str) -> None:
        if len(text) > self._written:
            self._write(text[self._written :])
            self._written = len(text)


class _Sampler(LogitsProcessor):
    """Masks logits [B, V] of B answers that stand for no token; if sampling, all but the drawn token of each answer.

    Each answer has its own generator. Raises ModelError if the logits are not finite.
    """

    def __init__(self, no_token: Tensor, settings: GenerationSettings, seeds: Sequence[int]) -> None:
        """`no_token`, bool [V], marks logits that stand for no token; `seeds` has one seed per answer."""
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
        # With a maximum of 0, low temperatures cannot overflow.
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
    """The new tokens of each of B prompts; EOS may be followed by others, until all answers have ended."""
    width = max(map(len, prompts))
    gaps = [width - len(prompt) for prompt in prompts]
    pad = tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * gap + prompt for gap, prompt in zip(gaps, prompts, strict=True)], device=lm.device)
    mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps], device=lm.device)
    first = _first_position(lm)
    config = GenerationConfig(
        max_new_tokens=_max_new_tokens(_positions(lm), settings),
        do_sample=False,  # `_Sampler` draws: `generate` would use one generator for all answers
        use_cache=use_cache,
        eos_token_id=list(_end_tokens(lm, tokenizer)) or None,
        pad_token_id=pad,
    )
    # `generate` takes unset options from the model's own settings.
    original, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        rows = lm.generate(
            ids,
            attention_mask=mask,
            # `generate` counts from 0 by default.
            position_ids=first + (mask.cumsum(dim=1) - 1).clamp(min=0) if first else None,
            generation_config=config,
            logits_processor=LogitsProcessorList([_Sampler(_no_token(lm, tokenizer), settings, seeds)]),
            streamer=streamer,
        )
    finally:
        lm.generation_config = original
    return rows[:, width:].tolist()


def _warpers(settings: GenerationSettings) -> LogitsProcessorList:
    """The logits processors for sampling, in the order of Hugging Face's `generate`."""
    warpers = LogitsProcessorList()
    if settings.temperature:
        warpers.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k:
            warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            warpers.append(TopPLogitsWarper(settings.top_p))
    return warpers


def _positions(lm: Any) -> int | None:
    """The maximum number of tokens of a prompt and its answer together; None if the model has no limit."""
    limit = position_limit(lm.config.get_text_config())
    return limit - _first_position(lm) if limit else None


def _first_position(lm: Any) -> int:
    """The position of a text's first token: 0, except in RoBERTa-like models, where it follows the padding position."""
    tables = [module for name, module in lm.named_modules() if name.endswith("position_embeddings")]
    padding = [table.padding_idx for table in tables if isinstance(table, nn.Embedding)]
    return max((index + 1 for index in padding if index is not None), default=0)


def _max_new_tokens(positions: int | None, settings: GenerationSettings) -> int:
    """The maximum tokens of an answer: at most half of the model's positions, so that part of the prompt fits."""
    return min(settings.max_new_tokens, positions // 2) if positions else settings.max_new_tokens


def _fitted(lm: Any, tokenizer: Any, prompts: Sequence[list[int]], settings: GenerationSettings) -> list[list[int]]:
    """The prompts, truncated at the beginning to the available room."""
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
    """All EOS tokens of tokenizer and model; a chat model has one for a turn and one for a text."""
    return set(end_tokens(tokenizer.eos_token_id, lm.config.eos_token_id, lm.generation_config.eos_token_id))


def _no_token(lm: Any, tokenizer: Any) -> Tensor:
    """Which of the model's V logits stand for no token, bool [V]: token tables are often padded to a round number."""
    logits = torch.arange(lm.get_output_embeddings().weight.shape[0])
    return ~torch.isin(logits, torch.tensor(list(tokenizer.get_vocab().values()))).to(lm.device)


def _decode(tokenizer: Any, ids: list[int]) -> str:
    """The text of tokens, without removing spaces before punctuation."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
