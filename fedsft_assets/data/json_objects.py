"""JSON decoding without silent repairs.

Duplicate fields, lone surrogates and bytes that are not UTF-8 stay visible to the caller. orjson is
faster but silently keeps the last duplicate; ijson replaces a lone surrogate with a question mark.
"""

import json
from typing import Any

from fedsft_assets.data.not_text import KEEP_BYTES


class Ambiguous(dict[str, Any]):
    """An object with duplicate fields: the last value of each field, and in `repeated` all values of duplicates."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.repeated = {
            name: [value for other, value in pairs if other == name] for name in self if names.count(name) > 1
        }


def decode(line: bytes) -> Any:
    """Decode the value in a line; an object with duplicate fields becomes `Ambiguous`.

    Bytes that are not UTF-8 are kept, see `not_text`. Raises ValueError for invalid JSON.
    """
    try:
        return DECODER.decode(line.decode(errors=KEEP_BYTES))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    return fields if len(fields) == len(pairs) else Ambiguous(pairs)


DECODER = json.JSONDecoder(object_pairs_hook=_object)
