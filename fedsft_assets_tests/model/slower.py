"""A real model that takes longer in one precision, on whatever machine."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedsft_assets.model.language_model import LanguageModel


@contextmanager
def slower_in(model: LanguageModel, precision: str, seconds: float) -> Iterator[None]:
    """Within the block, each of the model's passes in `32` or `bf16-mixed` takes so many seconds more."""

    def wait(*_: object) -> None:
        if torch.is_autocast_enabled("cpu") == (precision == "bf16-mixed"):
            time.sleep(seconds)

    handle = model.lm.base_model.register_forward_pre_hook(wait)
    try:
        yield
    finally:
        handle.remove()
