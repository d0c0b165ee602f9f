"""Answers of a Hugging Face causal language model: to many prompts at once, or to one, piece by piece.

One loop makes the tokens of both, with a key-value cache: each token is read once. Nothing here switches the
model to evaluation mode or moves it: the caller does.
"""

import inspect
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

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
    most = position_limit(lm.config.get_text_config())
    return most - _most_new_tokens(most, settings) if most else None


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
    prompts, most = _fitted(lm, tokenizer, prompts, settings)
    ends, seeds = _end_tokens(lm, tokenizer), _seeds(settings, len(prompts))
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        answer_ids: list[list[int]] = [[] for _ in chosen]
        going = set(range(len(chosen)))
        batch = [prompts[index] for index in chosen]
        steps = _steps(lm, tokenizer, batch, settings, [seeds[index] for index in chosen], use_cache)
        for tokens in islice(steps, most):
            going -= {row for row in going if tokens[row] in ends}
            for row in going:
                answer_ids[row].append(tokens[row])
            if not going:
                break
        for index, ids in zip(chosen, answer_ids, strict=True):
            answers[index] = _decode(tokenizer, ids).strip()
    return answers


def stream(lm: Any, tokenizer: Any, prompt: list[int], settings: GenerationSettings) -> Generator[str]:
    """The same answer to one prompt in pieces, each as soon as its characters are whole.

    Closing the iterator ends the work; errors as of `complete`.
    """
    [prompt], most = _fitted(lm, tokenizer, [prompt], settings)
    ends = _end_tokens(lm, tokenizer)
    ids: list[int] = []
    said = 0
    for [token] in islice(_steps(lm, tokenizer, [prompt], settings, _seeds(settings, 1)), most):
        if token in ends:
            break
        ids.append(token)
        # Blanks wait for what follows: at the end of an answer they are not part of it.
        whole = _decode(tokenizer, ids).lstrip().rstrip(_UNFINISHED).rstrip()
        if len(whole) > said:
            yield whole[said:]
            said = len(whole)
    if rest := _decode(tokenizer, ids).strip()[said:]:
        yield rest


def _steps(
    lm: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    settings: GenerationSettings,
    seeds: list[int],
    use_cache: bool = True,
) -> Generator[list[int]]:
    """The next token of each of B prompts, again and again, for as long as the caller wants more."""
    width = max(len(prompt) for prompt in prompts)
    gaps = [width - len(prompt) for prompt in prompts]
    pad = tokenizer.pad_token_id or 0
    rows = [[pad] * gap + prompt for gap, prompt in zip(gaps, prompts, strict=True)]
    ids = torch.tensor(rows, device=lm.device)
    mask = torch.tensor([[0] * gap + [1] * (width - gap) for gap in gaps], device=lm.device)
    generators = [torch.Generator(lm.device).manual_seed(seed) for seed in seeds]
    no_token = _no_token(lm, tokenizer)
    warpers = _warpers(settings)
    cache = None
    while True:
        logits, cache = _read(lm, ids, mask, cache, use_cache)
        logits = logits.masked_fill(no_token, -torch.inf)
        likeliest, tokens = logits.max(dim=-1)
        if not likeliest.isfinite().all():
            raise ModelError("the model's logits are not finite numbers: its weights are broken, or training diverged")
        if settings.temperature:
            # With 0 as the highest, no temperature is so low that anything overflows.
            probabilities = warpers(ids, logits - likeliest[:, None]).softmax(dim=-1)
            drawn = [
                torch.multinomial(row, 1, generator=generator)
                for row, generator in zip(probabilities, generators, strict=True)
            ]
            tokens = torch.cat(drawn)
        yield tokens.tolist()
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
        # A model that keeps no key-value cache (a state space model, say) reads all of it again.
        ids = tokens[:, None] if cache is not None else torch.cat([ids, tokens[:, None]], dim=1)


@torch.no_grad()
def _read(lm: Any, ids: Tensor, mask: Tensor, cache: Any, use_cache: bool) -> tuple[Tensor, Any]:
    """Logits [B, V] after the last token, in fp32, and the cache that now has `ids` [B, T] too.

    `mask` [B, S] is of all tokens so far, those in the cache included.
    """
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    # Not every architecture has all of these, and there are no others that it needs.
    wanted = {"position_ids": positions[:, -ids.shape[1] :], "past_key_values": cache, "logits_to_keep": 1}
    known = inspect.signature(lm.forward).parameters
    given = {name: value for name, value in wanted.items() if name in known}
    output = lm(input_ids=ids, attention_mask=mask, use_cache=use_cache, **given)
    return output.logits[:, -1].float(), output.get("past_key_values") if use_cache else None


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


def _most_new_tokens(positions: int, settings: GenerationSettings) -> int:
    """An answer gets half of the model's positions at the most, or a question might not be left."""
    return min(settings.max_new_tokens, positions // 2)


def _fitted(
    lm: Any, tokenizer: Any, prompts: Sequence[list[int]], settings: GenerationSettings
) -> tuple[list[list[int]], int]:
    """The prompts with as much of their end as there is room for, and how many tokens an answer can have."""
    if not all(prompts):
        raise ModelError("a prompt has no tokens; give it some text")
    room, most = prompt_room(lm, settings), position_limit(lm.config.get_text_config())
    if room is None or most is None:
        return list(prompts), settings.max_new_tokens
    front = front_tokens(tokenizer.backend_tokenizer)
    fitted = []
    for prompt in prompts:
        kept = front if prompt[: len(front)] == front else []
        fitted.append(prompt if len(prompt) <= room else kept + prompt[len(prompt) - room + len(kept) :])
    return fitted, _most_new_tokens(most, settings)


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
