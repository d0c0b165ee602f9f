"""What a user did wrong, said by Dagster without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from fedsft_assets.credentials import redacted


@contextmanager
def as_dagster_failure(*errors: type[Exception]) -> Iterator[None]:
    """Turn these errors, whose messages say all there is to know, into failures of the asset.

    Only what is `retryable` may be tried again: anything else would fail in the same way. No error of any kind that
    leaves this block has a secret in its words: Dagster keeps them.
    """
    with redacted():
        try:
            yield
        except errors as error:
            raise dg.Failure(str(error), allow_retries=getattr(error, "retryable", False)) from None
