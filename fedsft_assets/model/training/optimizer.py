"""AdamW and the learning rate of a whole job, from any of its steps on."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch.nn import Parameter
from torch.optim import AdamW

_FINAL_LEARNING_RATE = 0.1  # of the highest one


@dataclass(frozen=True)
class Schedule:
    """The learning rate over `total_steps`: a warm-up, then a cosine.

    In a warm-up of w = int(warmup_ratio * total_steps) steps, step s (0-based) has (s + 1) / (w + 1) of
    `learning_rate`; then a cosine falls to a tenth of it at `total_steps`. The values are those of NeMo's
    CosineAnnealing.
    """

    learning_rate: float
    total_steps: int
    warmup_ratio: float = 0.0

    def at(self, step: int) -> float:
        warmup = int(self.warmup_ratio * self.total_steps)
        if step <= warmup and warmup > 0:
            return self.learning_rate * (step + 1) / (warmup + 1)
        if step > self.total_steps:
            return self.learning_rate * _FINAL_LEARNING_RATE
        share = (step - warmup) / (self.total_steps - warmup)
        lowest = self.learning_rate * _FINAL_LEARNING_RATE
        return lowest + (self.learning_rate - lowest) * 0.5 * (1 + math.cos(math.pi * share))


# The moments of AdamW by position of the parameter, as in `state_dict()["state"]`.
Moments = dict[int, dict[str, Any]]


def build_optimizer(
    parameters: Iterable[Parameter], learning_rate: float, weight_decay: float, fused: bool, moments: Moments | None
) -> AdamW:
    """AdamW, without decay on biases and norms.

    `fused` updates all parameters in one kernel. `moments` are those of an earlier optimizer of the same
    parameters, to go on with; they become this one's.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    matrices, others = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=learning_rate, fused=fused)
    if moments:
        ordered = [*matrices, *others]
        for position, state in moments.items():
            optimizer.state[ordered[position]] = state
    return optimizer


def moments_of(optimizer: AdamW) -> Moments:
    """What a next optimizer of the same parameters goes on with; not copies."""
    state: Moments = optimizer.state_dict()["state"]
    return state
