"""The error raised for models, archives and tokenizers."""

from collections.abc import Iterable

_MAX_LISTED = 5


class ModelError(ValueError):
    """An unusable model, archive, tokenizer or set of weights."""


def listed(names: Iterable[str], separator: str = ", ", most: int = _MAX_LISTED) -> str:
    """The first `most` names and the number of the others, for a message."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more
