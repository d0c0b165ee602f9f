"""Trial of which precision is faster on this machine, with real batches and without changing the model."""

import statistics
import time
from collections.abc import Sequence
from itertools import cycle, islice
from typing import NamedTuple

from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.training.batches import Tokens, micro_batches
from fedsft_assets.model.training.devices.interface import OneDevice, precisions
from fedsft_assets.model.training.local_training import add_gradients, round_batches, training_mode
from fedsft_assets.specs.job import Precision
from fedsft_assets.specs.plan import SitePlan

_MAX_PASSES = 6  # per precision, of which the first is a warm-up
_SECONDS = 10.0  # after which no more passes are started, once there are two
# The minimum speedup for another precision than the first, whose fp32 results are the same on every machine.
_MIN_SPEEDUP = 1.05


class Trial(NamedTuple):
    """The chosen precision, and the reason, as words to print after it."""

    precision: Precision
    why: str


def faster_precision(model: LanguageModel, tokens: Sequence[Tokens], plan: SitePlan) -> Trial:
    """Resolve `auto` for a model on the CPU and its training records, by timing real passes.

    A pass is the forward and backward pass of a micro-batch; the optimizer does the same work in every precision. The
    model, its gradients (none) and random states are left unchanged. Nothing is tried if there is no choice, or no
    record.
    """
    choices = precisions()
    if len(choices) == 1 or not tokens:
        return Trial(choices[0], "the only choice for auto here")
    first, other = choices
    ratios = _ratios(model, tokens, plan, first, other)
    speed = statistics.median(ratios)
    reason = f"tried on {len(ratios)} batches, {other} has {speed:.2f} times the speed of {first} with this model"
    return Trial(other if speed > _MIN_SPEEDUP else first, reason)


def _ratios(
    model: LanguageModel, tokens: Sequence[Tokens], plan: SitePlan, first: Precision, other: Precision
) -> list[float]:
    """The speedup of the other precision, batch by batch; they alternate, since the machine's load may vary."""
    devices = {precision: OneDevice(model, precision) for precision in (first, other)}
    seconds: dict[Precision, list[float]] = {first: [], other: []}
    started = time.perf_counter()
    with training_mode(devices[first], plan.training, seed=0):
        for part in islice(cycle(_passes(model, tokens, plan)), _MAX_PASSES):
            targets = sum(tokens[index].targets(plan.training.answer_only_loss) for index in part)
            for precision in (first, other):
                pass_started = time.perf_counter()
                add_gradients(devices[precision], tokens, part, plan.training, targets)
                seconds[precision].append(time.perf_counter() - pass_started)
                model.zero_grad(set_to_none=True)
            if len(seconds[other]) > 1 and time.perf_counter() - started > _SECONDS:
                break
    return [one / two for one, two in zip(seconds[first][1:], seconds[other][1:], strict=True)]


def _passes(model: LanguageModel, tokens: Sequence[Tokens], plan: SitePlan) -> list[list[int]]:
    """The median-length micro-batch of each of the first batches, as indices of records."""
    training, packed = plan.training, model.answer_loss.packs
    limits = (training.micro_batch_size, training.micro_batch_tokens, packed)
    split = [micro_batches(tokens, batch, *limits) for batch in round_batches(tokens, plan, 0, packed)[:_MAX_PASSES]]
    return [parts[len(parts) // 2] for parts in split]
