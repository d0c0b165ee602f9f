"""Lines of progress: few enough to be read."""

import logging

import pytest

from fedsft_assets.model.progress import ByteProgress

_GIB = 1 << 30


def test_progress_is_logged_once_per_gib(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "fedsft_assets")
    progress = ByteProgress(4 * _GIB, "written")
    for _ in range(12):
        progress.add(_GIB // 4)
    assert caplog.messages == [
        "written 1.1 of 4.3 GB (25%)",
        "written 2.1 of 4.3 GB (50%)",
        "written 3.2 of 4.3 GB (75%)",
    ]
