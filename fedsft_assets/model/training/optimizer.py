"""AdamW and the learning rate schedule, which can resume at any step of a job."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch.nn import Parameter
from torch.optim import AdamW

_FINAL_LEARNING_RATE = 0.1  # relative to the peak


@dataclass(frozen=True)
class Schedule:
    """The learning rate over `total_steps`: linear warm-up, then cosine decay, as in NeMo's CosineAnnealing.

    In the warm-up of w = int(warmup_ratio * total_steps) steps, step s (0-based) has (s + 1) / (w + 1) of
    `learning_rate`; the cosine then decays to a tenth of it at `total_steps`.
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


# AdamW's moments by parameter index, as in `state_dict()["state"]`.
Moments = dict[int, dict[str, Any]]


def build_optimizer(
    parameters: Iterable[Parameter], learning_rate: float, weight_decay: float, fused: bool, moments: Moments | None
) -> AdamW:
    """AdamW, without weight decay on biases and norms.

    `fused` updates all parameters in one kernel. `moments` are those of an earlier optimizer of the same parameters,
    to continue from; this optimizer takes ownership of them.
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
    """The optimizer's moments, without copying, for a later optimizer of the same parameters."""
    state: Moments = optimizer.state_dict()["state"]
    return state
