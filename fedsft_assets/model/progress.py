"""Log lines for the progress of work measured in bytes."""

import logging

_LOG_EVERY = 1 << 30

_log = logging.getLogger(__name__)


class ByteProgress:
    """Logs, once per GiB, how many of `total` bytes are done; `verb` is a past participle, such as `written`."""

    def __init__(self, total: int, verb: str) -> None:
        self._total, self._verb, self._bytes = total, verb, 0

    def add(self, count: int) -> None:
        before, self._bytes = self._bytes, self._bytes + count
        if self._bytes // _LOG_EVERY > before // _LOG_EVERY:
            share = self._bytes / self._total
            _log.info("%s %.1f of %.1f GB (%.0f%%)", self._verb, self._bytes / 1e9, self._total / 1e9, 100 * share)
