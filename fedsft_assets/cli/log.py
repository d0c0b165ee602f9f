"""What a command shows of the package's log."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fedsft_assets.credentials import redact

_PACKAGE = logging.getLogger("fedsft_assets")


class _TerminalHandler(logging.Handler):
    """Prints messages: progress to standard output, warnings and errors, named as such, to standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = redact(self.format(record))
            if record.levelno < logging.WARNING:
                print(text, flush=True)
            else:
                print(f"{record.levelname.lower()}: {text}", file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


@contextmanager
def shown_log() -> Iterator[None]:
    """In this block, what the package logs from INFO on is shown, without secrets."""
    handler, level = _TerminalHandler(), _PACKAGE.level
    _PACKAGE.addHandler(handler)
    _PACKAGE.setLevel(logging.INFO)
    try:
        yield
    finally:
        _PACKAGE.removeHandler(handler)
        _PACKAGE.setLevel(level)
