"""Loss and tokens by prompt, which is the unit that everything else draws: what a site can make without pandas.

Answers to one prompt resemble each other, so they are one observation together, however many there are.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]


class ScoresError(ValueError):
    """Scores that no comparison can be made of: the message names the model, the record and what was found."""


class Model(NamedTuple):
    """One checkpoint: the job that made it, and the seed it was trained with, None for a model without training."""

    job: str
    seed: int | None

    def __str__(self) -> str:
        return self.job if self.seed is None else f"{self.job}, seed {self.seed}"


@dataclass(frozen=True)
class PromptLosses:
    """M models on the same C prompts, in the order of the prompts' digests.

    `tokens` [C] are the answer tokens of a prompt's records, `losses` [M, C] their summed losses in nats, `records` how
    many there are.
    """

    models: tuple[Model, ...]
    tokens: Numbers
    losses: Numbers
    records: int

    @property
    def prompts(self) -> int:
        return len(self.tokens)
