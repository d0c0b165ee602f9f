"""Encoding of prompts and records with a model's own tokenizer, with all content treated as plain text.

A prompt and its answer are encoded as one text. Control tokens come from the tokenizer's post-processor and from
training, never from a text that spells them out.
"""

import secrets
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Self

import orjson
from tokenizers import Tokenizer, models

from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.tokenizer.description import (
    for_plain_text,
    reachable_controls,
    without_dummy_prefix,
    words_end_at_spaces,
)


class TextEncoder:
    """An encoder of texts to token ids, from a tokenizer.json.

    `front` are the ids that the tokenizer prepends to every text: BOS, GLM's two tokens, or none; methods do not
    return them. `way` is a JSON value of everything that determines the returned ids, and nothing else.
    """

    def __init__(self, description: bytes) -> None:
        """Read a tokenizer.json. Raises ModelError if it is invalid."""
        tokenizer = _read(description)
        content = orjson.loads(tokenizer.to_str())  # normalized by this version of the library
        controls = sorted(reachable_controls(content))
        # Special tokens only matter where they may hide a match of one that is not special.
        added = content["added_tokens"] if any(not token["special"] for token in content["added_tokens"]) else []
        self.front = front_tokens(tokenizer)
        self.way = [content["normalizer"], content["pre_tokenizer"], content["model"], added, controls]
        # The model would match controls by name, so they get names that no text can contain.
        secret = secrets.token_hex(16)
        self._content = for_plain_text(content, {control: f"{secret}-{n}" for n, control in enumerate(controls)})

    @classmethod
    def of(cls, tokenizer: Any) -> Self:
        """The encoder of a Hugging Face tokenizer. Raises ModelError if that is not a fast tokenizer."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(f"{type(tokenizer).__name__}: is not a fast tokenizer; save it with a tokenizer.json")
        return cls(backend.to_str().encode())

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text on its own."""
        return _encode(self._tokenizer, texts)

    def records(self, prompts: Sequence[str], answers: Sequence[str]) -> Iterator[tuple[list[int], int]]:
        """Yield the ids of each prompt and its answer as one text, and the number of ids of the prompt.

        The ids begin with those of the prompt alone, because in generation an answer follows exactly these. Where the
        whole text has other ids, because a token spans the boundary, the answer is encoded as a continuation.
        """
        pairs = list(zip(prompts, answers, strict=True))
        # Encoding separately gives the same ids here, without encoding prompts twice.
        separate = [self._splits_at_spaces and _is_at_a_space(*pair) for pair in pairs]
        wholes = iter(
            self.prompts(
                [prompt + answer for (prompt, answer), split in zip(pairs, separate, strict=True) if not split]
            )
        )
        continued = iter(
            _encode(self._continuing, [answer for (_, answer), split in zip(pairs, separate, strict=True) if split])
        )
        for prompt, answer, split in zip(self.prompts(prompts), answers, separate, strict=True):
            if split:
                ids = prompt + next(continued)
            elif (ids := next(wholes))[: len(prompt)] != prompt:
                ids = prompt + _encode(self._continuing, [answer])[0]
            yield ids, len(prompt)

    @cached_property
    def _splits_at_spaces(self) -> bool:
        return words_end_at_spaces(self._content)

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return _tokenizer(self._content)

    @cached_property
    def _continuing(self) -> Tokenizer:
        continuing = without_dummy_prefix(self._content)
        return self._tokenizer if continuing == self._content else _tokenizer(continuing)


def front_tokens(tokenizer: Tokenizer) -> list[int]:
    """The ids that a tokenizer prepends to every text."""
    post_processor = tokenizer.post_processor
    if post_processor is None:
        return []
    text = Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).encode("a")
    processed = post_processor.process(text)
    return processed.ids[: processed.special_tokens_mask.index(0)]


def _is_at_a_space(prompt: str, answer: str) -> bool:
    return answer.startswith(" ") and bool(prompt) and not prompt[-1].isspace()


def _read(description: bytes) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(description)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise ModelError(f"tokenizer.json: cannot be read: {error}; save it with a current tokenizers") from error


def _tokenizer(content: dict[str, Any]) -> Tokenizer:
    tokenizer = _read(orjson.dumps(content))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    try:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    except Exception as error:  # bare Exception too: an unknown word, and no token for unknown words
        raise ModelError(f"tokenizer.json: cannot encode a text: {error}; use a model whose tokenizer can") from error
