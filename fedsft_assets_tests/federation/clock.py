"""A clock that tests turn."""


class Clock:
    """In place of `time.monotonic`."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now
