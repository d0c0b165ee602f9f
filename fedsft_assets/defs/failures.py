"""Reports user errors in Dagster without a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

import dagster as dg

from fedsft_assets.credentials import redacted


@contextmanager
def as_dagster_failure(*errors: type[Exception]) -> Iterator[None]:
    """Convert these errors, whose messages are self-explanatory, to failures of the step.

    Retries are allowed only if the error is `retryable`: anything else would fail again. Secrets are redacted from
    every error that leaves the block, since Dagster stores them.
    """
    with redacted():
        try:
            yield
        except errors as error:
            raise dg.Failure(str(error), allow_retries=getattr(error, "retryable", False)) from None
