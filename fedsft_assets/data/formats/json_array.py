"""Streaming reader of a JSON file that is one array; memory holds only a few of its values."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from fedsft_assets.data.json_objects import DECODER
from fedsft_assets.data.not_text import KEEP_BYTES
from fedsft_assets.data.records import DataError, cut_off, excerpt

_CHARS = 1 << 20  # characters to read at a time
_LONGEST_LITERAL = 12  # longest incomplete literal at the end of a chunk: `-Infinity`, an escaped surrogate pair
_SPACE = re.compile(r"[ \t\n\r]*")


def values(path: Path, chars: int = _CHARS) -> Iterator[tuple[int, Any]]:
    """Yield each value of the array with its number, from 1, decoded as by `json_objects.decode`.

    The file is read by `chars` characters.

    Raises DataError if the file is not a JSON array, is truncated, or continues after the array.
    """
    row = 0
    with path.open(encoding="utf-8-sig", errors=KEEP_BYTES, newline="") as file:
        text = _Text(file, chars)
        try:
            text.expect("[")
            if text.peek() == "]":
                text.expect("]")
            else:
                separator = ","
                while separator == ",":
                    value = text.value()
                    row += 1
                    yield row, value
                    separator = text.expect(",", "]")
            text.expect("")
        except _CutOff as error:
            raise cut_off(path, row + 1, str(error)) from error
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            raise DataError(
                f"{path}: after row {row}: is not a JSON array of objects ({reason}); fix the file, or set "
                "'format: jsonl' if each line is an object"
            ) from error


class _CutOff(Exception):
    """The text ends too early; the message is its end."""


class _Text:
    """A parser's position in a file's text; only the part that is being parsed is in memory."""

    def __init__(self, file: TextIO, chars: int) -> None:
        self._file, self._chars = file, chars
        self._text = ""
        self._at = 0
        self._ended = False

    def peek(self) -> str:
        """The next character that is not white space; empty at the end of the text."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read_more()

    def expect(self, *characters: str) -> str:
        """Consume and return the next character, which must be one of these; an empty one is the end of the text."""
        found = self.peek()
        if found not in characters:
            if not found:
                raise _CutOff(self._text)
            expected = " or ".join(map(repr, characters)) if any(characters) else "the end"
            raise ValueError(f"expected {expected}, found {excerpt(self._text[self._at : self._at + 100])!r}")
        self._at += len(found)
        return found

    def value(self) -> Any:
        """Consume and return the next value. Raises ValueError if it is not JSON."""
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                if not self._may_be_incomplete(error):
                    found = excerpt(self._text[error.pos : error.pos + 100])
                    raise ValueError(f"{error.msg}, found {found!r}") from error
                if self._ended:
                    raise _CutOff(self._text[self._at :]) from error
            else:
                if end < len(self._text) or self._ended:
                    self._at = end
                    return value
            self._read_more()

    def _may_be_incomplete(self, error: json.JSONDecodeError) -> bool:
        return error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _LONGEST_LITERAL

    def _read_more(self) -> None:
        """Read at least as much as is held, so that parsing a long value is restarted only a few times."""
        rest = self._text[self._at :]
        if fresh := self._file.read(max(self._chars, len(rest))):
            self._text, self._at = rest + fresh, 0
        self._ended = not fresh
