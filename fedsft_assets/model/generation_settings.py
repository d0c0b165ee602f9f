"""The user's settings for generating answers, validated. Imports nothing heavy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedsft_assets.model.errors import ModelError


@dataclass(frozen=True)
class GenerationSettings:
    """Settings for one answer: greedy at temperature 0, sampled otherwise.

    An answer ends at EOS or after `max_new_tokens`. Sampling is from the `top_k` most likely tokens (0: all),
    and of these from the most likely with a total probability of `top_p`. Each prompt has its own generator with
    `seed`, so its answer does not depend on the others; None draws seeds from torch's generator. Raises
    ModelError that names the field and value.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for field, fits, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("top_p", 0 < self.top_p <= 1, "more than 0 and at most 1"),
            ("seed", self.seed is None or 0 <= self.seed < 1 << 63, "0 to 2^63 - 1"),
        ):
            if not fits:
                raise ModelError(f"{field}: expected {expected}, found {getattr(self, field)}")


def end_tokens(*named: int | Sequence[int] | None) -> list[int]:
    """The distinct EOS ids from several sources, each of which has one id, several, or none."""
    every = [[one] if isinstance(one, int) else one or [] for one in named]
    return list(dict.fromkeys(token for some in every for token in some))
