"""Invalid text: bytes that are not UTF-8, and lone surrogates.

Readers pass both on without loss, as characters that valid text cannot contain, so that the row can be
rejected with a message that shows them.
"""

import codecs
import re

NOT_UTF8 = "is not UTF-8"
KEEP_BYTES = "fedsft_keep_bytes"  # error handler: the `errors` argument of `open`
_BYTE = "\udfff"  # precedes a kept byte: `surrogateescape` alone gives bytes and lone surrogates the same code
_BYTES = re.compile(f"{_BYTE}([\udc80-\udcff])")
_NO_CHARACTER = re.compile("[\ud800-\udfff]")
_AROUND = 20  # characters to show before and after an invalid one


def why_no_text(value: str) -> tuple[str, str] | None:
    """What is wrong with a text, and a printable excerpt around it; None if the text is valid."""
    wrong = _NO_CHARACTER.search(value)
    if wrong is None:
        return None
    problem = NOT_UTF8 if _BYTES.match(value, wrong.start()) else "has an unpaired UTF-16 surrogate"
    start = wrong.start()
    before, after = value[max(0, start - 2 * _AROUND) : start], value[start : start + 2 * _AROUND]
    return problem, printable(before)[-_AROUND:] + printable(after)[: 2 * _AROUND]


def ends_in_a_byte(value: str) -> bool:
    """Whether the text ends in a byte that is not UTF-8, such as the start of a truncated character."""
    return _BYTES.fullmatch(value[-2:]) is not None


def printable(value: str) -> str:
    """The text, with invalid characters as backslash escapes."""
    shown = _BYTES.sub(lambda byte: f"\\x{ord(byte[1]) & 0xFF:02x}", value)
    return shown.encode(errors="backslashreplace").decode()


def _kept(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    bytes_ = error.object[error.start : error.end]
    return "".join(_BYTE + chr(0xDC00 + byte) for byte in bytes_), error.end


codecs.register_error(KEEP_BYTES, _kept)
