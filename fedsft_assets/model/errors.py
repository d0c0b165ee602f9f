"""The error raised for models, archives and tokenizers."""

from collections.abc import Iterable

_MAX_LISTED = 5


class ModelError(ValueError):
    """An unusable model, archive, tokenizer or set of weights."""


def listed(names: Iterable[str], separator: str = ", ") -> str:
    """The first names and the number of the others, for a message."""
    names = list(names)
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return separator.join(names[:_MAX_LISTED]) + more
