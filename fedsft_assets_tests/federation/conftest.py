import gc
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedsft_assets.federation.protocol.messages import STATE_ROOT
from fedsft_assets.federation.server.base_model import read_nemo_weights
from fedsft_assets_tests.federation.clock import Clock
from fedsft_assets_tests.federation.rounds import BASE, copied


@pytest.fixture(scope="session", autouse=True)
def _loaded_modules_are_not_collected() -> Iterator[None]:
    """As in the processes of a job: each round collects garbage."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def base_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """`base.nemo` is the base model of the tests' own, whose weights are BASE."""
    real = read_nemo_weights
    monkeypatch.setattr(
        "fedsft_assets.federation.server.global_model.read_nemo_weights",
        lambda path: copied(BASE) if path == Path("base.nemo") else real(path),
    )
    monkeypatch.setattr("fedsft_assets.federation.server.global_model.own_base_model", lambda path, _environment: path)
    monkeypatch.delenv(STATE_ROOT, raising=False)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock
