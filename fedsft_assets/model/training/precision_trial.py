"""What a model computes faster in on this machine: tried with real batches, without changing the model."""

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

_MOST_PASSES = 6  # in each precision, the first of which warms up
_SECONDS = 10.0  # no more passes are begun after them, once there are two
# By how much another precision must be faster than the first: results in fp32 are the same on every machine.
_WORTH_IT = 1.05


class Trial(NamedTuple):
    """The precision to compute in, and why, as words that come after it."""

    precision: Precision
    why: str


def faster_precision(model: LanguageModel, tokens: Sequence[Tokens], plan: SitePlan) -> Trial:
    """What `auto` is for a model on the CPU and the records that it is trained on, by the seconds of real passes.

    A pass is a micro-batch's forward and backward; the optimizer does the same work in every precision. The model, its
    gradients (none) and random states are afterwards what they were. Nothing is tried where there is no choice, or no
    record.
    """
    choices = precisions()
    if len(choices) == 1 or not tokens:
        return Trial(choices[0], "all that auto can be here")
    first, other = choices
    ratios = _ratios(model, tokens, plan, first, other)
    speed = statistics.median(ratios)
    told = f"tried on {len(ratios)} batches, {other} has {speed:.2f} times the speed of {first} with this model"
    return Trial(other if speed > _WORTH_IT else first, told)


def _ratios(
    model: LanguageModel, tokens: Sequence[Tokens], plan: SitePlan, first: Precision, other: Precision
) -> list[float]:
    """How many times as fast the other precision is, batch by batch. Each takes turns: other processes come and go."""
    devices = {precision: OneDevice(model, precision) for precision in (first, other)}
    seconds: dict[Precision, list[float]] = {first: [], other: []}
    started = time.perf_counter()
    with training_mode(devices[first], plan.training, seed=0):
        for part in islice(cycle(_passes(model, tokens, plan)), _MOST_PASSES):
            targets = sum(tokens[index].targets(plan.training.answer_only_loss) for index in part)
            for precision in (first, other):
                begun = time.perf_counter()
                add_gradients(devices[precision], tokens, part, plan.training, targets)
                seconds[precision].append(time.perf_counter() - begun)
                model.zero_grad(set_to_none=True)
            if len(seconds[other]) > 1 and time.perf_counter() - started > _SECONDS:
                break
    return [one / two for one, two in zip(seconds[first][1:], seconds[other][1:], strict=True)]


def _passes(model: LanguageModel, tokens: Sequence[Tokens], plan: SitePlan) -> list[list[int]]:
    """Of each of the first batches, the micro-batch of middling length: records of each, by number."""
    training, packed = plan.training, model.answer_loss.packs
    limits = (training.micro_batch_size, training.micro_batch_tokens, packed)
    cut = [micro_batches(tokens, batch, *limits) for batch in round_batches(tokens, plan, 0, packed)[:_MOST_PASSES]]
    return [parts[len(parts) // 2] for parts in cut]
