"""What a model's own tokenizer makes of prompts and records, in which nothing is more than text.

A prompt and its answer are one text, as they are for whoever reads both. Control tokens come from the tokenizer's
frame and from training, never from what a text spells out.
"""

import secrets
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Self

import orjson
from tokenizers import Tokenizer, models

from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.tokenizer.description import (
    reachable_controls,
    with_texts_alone,
    without_dummy_prefix,
    words_end_at_spaces,
)


class TextEncoder:
    """Texts to token ids, for a tokenizer.json.

    `front` are the ids that the tokenizer puts before every text: BOS, GLM's two tokens, or none. They are in none
    of the ids that methods give. `way` is all that decides those ids, and nothing else, as JSON has it.
    """

    def __init__(self, description: bytes) -> None:
        """Raises ModelError if the tokenizer.json cannot be read."""
        own = _read(description)
        said = orjson.loads(own.to_str())  # as this version says it, whichever wrote it
        controls = sorted(reachable_controls(said))
        # Special tokens are matched only to be passed over, where they may hide one that is not special.
        added = said["added_tokens"] if any(not token["special"] for token in said["added_tokens"]) else []
        self.front = front_tokens(own)
        self.way = [said["normalizer"], said["pre_tokenizer"], said["model"], added, controls]
        # The model would find controls under their own names, so they get names that no text can know.
        secret = secrets.token_hex(16)
        self._said = with_texts_alone(said, {control: f"{secret}-{n}" for n, control in enumerate(controls)})

    @classmethod
    def of(cls, tokenizer: Any) -> Self:
        """The encoder of a Hugging Face tokenizer. Raises ModelError if that has no fast form."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(f"{type(tokenizer).__name__}: has no fast form; save it with a tokenizer.json")
        return cls(backend.to_str().encode())

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text on its own."""
        return _encode(self._tokenizer, texts)

    def records(self, prompts: Sequence[str], answers: Sequence[str]) -> Iterator[tuple[list[int], int]]:
        """The ids of each prompt and its answer as one text, and how many of them are the prompt's.

        These are always the ids of the prompt on its own, for an answer is generated after them. Where the whole text
        has others, because one token spans the border, the answer is encoded as what goes on after the prompt.
        """
        pairs = list(zip(prompts, answers, strict=True))
        # Whole texts would have the same ids, and prompts would be encoded twice.
        apart = [self._cuts_at_spaces and _is_at_a_space(*pair) for pair in pairs]
        wholes = iter(
            self.prompts([prompt + answer for (prompt, answer), cut in zip(pairs, apart, strict=True) if not cut])
        )
        continued = iter(
            _encode(self._continuing, [answer for (_, answer), cut in zip(pairs, apart, strict=True) if cut])
        )
        for prompt, answer, cut in zip(self.prompts(prompts), answers, apart, strict=True):
            if cut:
                ids = prompt + next(continued)
            elif (ids := next(wholes))[: len(prompt)] != prompt:
                ids = prompt + _encode(self._continuing, [answer])[0]
            yield ids, len(prompt)

    @cached_property
    def _cuts_at_spaces(self) -> bool:
        return words_end_at_spaces(self._said)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return _tokenizer(self._said)

    @cached_property
    def _continuing(self) -> Tokenizer:
        going_on = without_dummy_prefix(self._said)
        return self._tokenizer if going_on == self._said else _tokenizer(going_on)


def front_tokens(tokenizer: Tokenizer) -> list[int]:
    """The ids that a tokenizer puts before every text."""
    frame = tokenizer.post_processor
    if frame is None:
        return []
    text = Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).encode("a")
    framed = frame.process(text)
    return framed.ids[: framed.special_tokens_mask.index(0)]


def _is_at_a_space(prompt: str, answer: str) -> bool:
    return answer.startswith(" ") and bool(prompt) and not prompt[-1].isspace()


def _read(description: bytes) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(description)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelError(f"tokenizer.json: cannot be read: {error}; save it with a current tokenizers") from error


def _tokenizer(said: dict[str, Any]) -> Tokenizer:
    tokenizer = _read(orjson.dumps(said))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    try:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    except Exception as error:  # bare too: a word that is not in a vocabulary without a token for unknown ones
        raise ModelError(f"tokenizer.json: cannot encode a text: {error}; use a model whose tokenizer can") from error
