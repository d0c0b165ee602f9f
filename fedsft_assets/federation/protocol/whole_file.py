"""Atomic writing of the state files that server and sites keep between rounds."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path, lasting: bool = True) -> Iterator[BinaryIO]:
    """Write a file that appears under its name only once it is complete; `lasting`: also synced to disk.

    Raises OSError with the path; the partial file is removed first, to free space for error reports.
    """
    fresh = path.with_name(f"{path.name}.new")
    try:
        with fresh.open("wb") as file:
            yield file
            file.flush()
            if lasting:
                os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException as error:
        fresh.unlink(missing_ok=True)
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch wraps the OSError
        if isinstance(cause, OSError):
            raise OSError(cause.errno, cause.strerror, str(path)) from error
        raise
