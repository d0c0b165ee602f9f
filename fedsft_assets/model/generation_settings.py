"""How answers are generated: what a user can say about it, checked. Imports nothing heavy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedsft_assets.model.errors import ModelError


@dataclass(frozen=True)
class GenerationSettings:
    """How one answer comes about: greedy at temperature 0, else sampled.

    An answer ends at EOS or after `max_new_tokens`. Sampling is from the `top_k` likeliest tokens (0: from
    all), of these from the likeliest that together have the probability `top_p`. Every prompt is sampled with
    `seed` on its own, so its answer does not depend on the others; None draws a seed from torch's generator.
    Raises ModelError that names the value.
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
    """The ids that end an answer, each once, of what several places call EOS: one, several, or none."""
    every = [[one] if isinstance(one, int) else one or [] for one in named]
    return list(dict.fromkeys(token for some in every for token in some))
