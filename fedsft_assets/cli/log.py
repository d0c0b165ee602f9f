"""Shows the package's log in the terminal."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fedsft_assets.credentials import redact

_PACKAGE = logging.getLogger("fedsft_assets")


class _TerminalHandler(logging.Handler):
    """Prints progress to standard output, and warnings and errors, with their level, to standard error."""

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
    """Show the package's log from level INFO on within the block, with secrets redacted."""
    handler, level = _TerminalHandler(), _PACKAGE.level
    _PACKAGE.addHandler(handler)
    _PACKAGE.setLevel(logging.INFO)
    try:
        yield
    finally:
        _PACKAGE.removeHandler(handler)
        _PACKAGE.setLevel(level)
