"""What a user did wrong, said by Dagster without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg


@contextmanager
def explained(*errors: type[Exception]) -> Iterator[None]:
    """Turn these errors, whose messages say all there is to know, into failures of the asset.

    Only what is `lost` may be tried again: anything else would fail in the same way.
    """
    try:
        yield
    except errors as error:
        raise dg.Failure(str(error), allow_retries=getattr(error, "lost", False)) from None
