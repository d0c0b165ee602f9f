"""JSON as others write it, decoded without silent repairs.

A field that occurs twice, half of a surrogate pair and bytes that are not UTF-8 stay visible to whoever
uses the value. orjson is faster, but keeps the last of two fields and says nothing; ijson makes half of a
pair a question mark.
"""

import json
from typing import Any

from fedsft_assets.data.not_text import KEEP_BYTES


class Ambiguous(dict[str, Any]):
    """An object that has a field more than once: the last value of each, and all values of those in `repeated`."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        names = [name for name, _ in pairs]
        self.repeated = {
            name: [value for other, value in pairs if other == name] for name in self if names.count(name) > 1
        }


def decode(line: bytes) -> Any:
    """The value in a line; an object with a field that occurs twice is `Ambiguous`.

    Bytes that are not UTF-8 are kept, see `not_text`. Raises ValueError for what is not JSON.
    """
    try:
        return DECODER.decode(line.decode(errors=KEEP_BYTES))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    return fields if len(fields) == len(pairs) else Ambiguous(pairs)


DECODER = json.JSONDecoder(object_pairs_hook=_object)
