"""What is noted of a training while it runs: the end, the loss and the tokens of each step, and its peak memory."""

import resource
import time
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Trained:
    """One contender's training, as its process prints it.

    `tokens_per_second` counts tokens of records, prompt and answer, over the time of all steps but the
    first. `first_loss` is the loss of the input's first batch at the initial weights, `losses` are those
    of the contender's own steps. `start_cpu_seconds` lie between Python's start and the first batch.
    """

    tokens_per_second: float
    peak_mb: float
    start_cpu_seconds: float
    first_loss: float
    losses: list[float]
    tokens: list[int]
    seconds: float


@dataclass
class Watch:
    """Steps as they end. Made before the model is, so that it sees its first batch."""

    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    peak_mb: float = 0.0
    start_cpu_seconds: float = 0.0

    def __post_init__(self) -> None:
        import torch
        from torch.nn.modules.module import register_module_forward_pre_hook

        def first_batch(*_: Any) -> None:
            if torch.is_grad_enabled():  # else something is only tried out
                self.start_cpu_seconds = time.process_time()
                handle.remove()

        handle = register_module_forward_pre_hook(first_batch)

    def step(self, loss: float, tokens: int) -> None:
        """One optimizer step is done; `tokens` are those of its records, without padding."""
        self.ends.append(time.perf_counter())
        self.losses.append(loss)
        self.tokens.append(tokens)
        self.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6

    def trained(self, first_loss: float) -> Trained:
        seconds = self.ends[-1] - self.ends[0]
        return Trained(
            tokens_per_second=sum(self.tokens[1:]) / seconds,
            peak_mb=self.peak_mb,
            start_cpu_seconds=self.start_cpu_seconds,
            first_loss=first_loss,
            losses=self.losses,
            tokens=self.tokens,
            seconds=seconds,
        )
