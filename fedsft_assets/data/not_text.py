"""What a file has where a text should be: bytes that are not UTF-8, and halves of surrogate pairs.

Both go through a reader without loss, as characters that no text can have, so that the row is rejected
and a message shows what was there.
"""

import codecs
import re

NOT_UTF8 = "is not UTF-8"
KEEP_BYTES = "fedsft_keep_bytes"  # what to open files with, as `errors`
_BYTE = "\udfff"  # stands before one: Python's `surrogateescape` has one code for a byte and for half a pair
_BYTES = re.compile(f"{_BYTE}([\udc80-\udcff])")
_NO_CHARACTER = re.compile("[\ud800-\udfff]")
_AROUND = 20  # characters that a message shows before and after a wrong one


def why_no_text(value: str) -> tuple[str, str] | None:
    """What is wrong with a text, if anything, and a printable piece of it that shows where."""
    wrong = _NO_CHARACTER.search(value)
    if wrong is None:
        return None
    problem = NOT_UTF8 if _BYTES.match(value, wrong.start()) else "has half of a UTF-16 surrogate pair"
    start = wrong.start()
    before, after = value[max(0, start - 2 * _AROUND) : start], value[start : start + 2 * _AROUND]
    return problem, printable(before)[-_AROUND:] + printable(after)[: 2 * _AROUND]


def ends_in_a_byte(value: str) -> bool:
    """Whether the last character is a byte that is not UTF-8, such as the first of several that a character has."""
    return _BYTES.fullmatch(value[-2:]) is not None


def printable(value: str) -> str:
    """The text, with backslashes where it is none."""
    shown = _BYTES.sub(lambda byte: f"\\x{ord(byte[1]) & 0xFF:02x}", value)
    return shown.encode(errors="backslashreplace").decode()


def _kept(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    bytes_ = error.object[error.start : error.end]
    return "".join(_BYTE + chr(0xDC00 + byte) for byte in bytes_), error.end


codecs.register_error(KEEP_BYTES, _kept)
