"""Training of one round at one site, and the loss of a model on records.

The model is trained in place. A round depends only on its weights, the tokens, the plan and the optimizer's
moments, so that a restarted round repeats exactly.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fedsft_assets.memory import freed_memory_kept
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.perplexity import perplexity
from fedsft_assets.model.training.batches import Tokens, evaluation_batches, micro_batches, training_batches
from fedsft_assets.model.training.devices.interface import Devices, OneDevice
from fedsft_assets.model.training.drift_correction import Correction
from fedsft_assets.model.training.optimizer import Moments, Schedule, build_optimizer, moments_of
from fedsft_assets.model.training.seeds import seed_of
from fedsft_assets.model.training.token_cache import tokenized
from fedsft_assets.specs.plan import ResolvedTraining, SitePlan


class TrainingError(RuntimeError):
    """Training that cannot continue; the model's weights must not be used."""


@dataclass(frozen=True)
class StepPoint:
    """One optimizer step.

    `round` is 0-based, `step` 1-based within the round's `steps`. `samples` counts the records that the site has
    seen in the whole job so far, `tokens` the answer tokens of this step, `all_tokens` all of its tokens without
    padding. `loss` is the mean per answer token, in nats, before the step; `seconds` is the step's duration.
    """

    round: int
    step: int
    steps: int
    samples: int
    tokens: int
    all_tokens: int
    loss: float
    learning_rate: float
    seconds: float


@dataclass(frozen=True)
class RoundReport:
    """A round: the records, answer tokens and all tokens (without padding) trained on, and the mean loss per answer
    token in nats."""

    samples: int
    tokens: int
    all_tokens: int
    steps: int
    loss: float
    seconds: float
    points: list[StepPoint] = field(repr=False)
    moments: Moments = field(repr=False)


@dataclass(frozen=True)
class Loss:
    """The mean loss in nats over `tokens` answer tokens."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)


def split_tokens(model: LanguageModel, records_file: Path, max_length: int, most: int | None = None) -> list[Tokens]:
    """The first `most` records of a JSONL split as tokens for this model, truncated to `max_length` and its limit."""
    special = model.special_tokens
    tokens = tokenized(records_file, model.tokenizer_json, model.prompt_template)
    return tokens.records(min(max_length, model.max_length), special.front, special.eos, most)


def train_round(
    model: LanguageModel,
    tokens: Sequence[Tokens],
    plan: SitePlan,
    round: int,
    on_step: Callable[[StepPoint], None] | None = None,
    moments: Moments | None = None,
    devices: Devices | None = None,
    batches: Sequence[Sequence[int]] | None = None,
    correction: Correction | None = None,
) -> RoundReport:
    """Train the model in place for one round (0-based).

    `on_step` is called after every step. `moments` are those in the previous round's report, to continue with its
    optimizer state; without them it starts from zero. `batches` are indices of records that replace those of the plan;
    `correction` is applied to each step. The loss of a step is the mean over the targets of its whole batch, however
    that is split into micro-batches and among devices.
    Raises TrainingError that names site, round and step if there are no records or a loss is not finite.
    """
    if not tokens:
        raise TrainingError(f"{plan.site}: no records to train on in {plan.training_file}")
    training = plan.training
    devices = devices or OneDevice(model, training.precision)
    batches = round_batches(tokens, plan, round, model.answer_loss.packs) if batches is None else batches
    rates = _learning_rates(plan, round, len(batches))
    optimizer = build_optimizer(
        model.parameters(), rates[0], training.weight_decay, fused=training.precision != "16-mixed", moments=moments
    )
    prepared = devices.prepared(optimizer)
    samples = plan.work.samples(len(tokens)) * round
    if correction:
        correction.begin(model)
    points: list[StepPoint] = []
    started = time.perf_counter()
    with training_mode(devices, training, seed=_seed(plan, f"dropout of round {round}")):
        for step, (indices, rate) in enumerate(zip(batches, rates, strict=True), start=1):
            step_started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = rate
            targets = sum(tokens[index].targets(training.answer_only_loss) for index in indices)
            loss = add_gradients(devices, tokens, indices, training, targets)
            if not math.isfinite(loss):
                hint = f"at learning rate {rate:.3g}; try a lower one or precision 32"
                if plan.filters.privacy and round > 0:  # the first round's model has no noise yet
                    numbers = sum(map(torch.numel, model.distinct_parameters().values()))
                    hint = plan.filters.privacy.remedy(numbers, hint)
                raise TrainingError(
                    f"{plan.job}, {plan.site}: the loss is {loss} in round {round + 1}, step {step} of {len(batches)},"
                    f" {hint}"
                )
            if correction:
                correction.before_step(devices.scale)
            devices.step(prepared, training.gradient_clip)
            if correction:
                correction.after_step(rate)
            samples += len(indices)
            seconds = time.perf_counter() - step_started
            whole = sum(len(tokens[index]) for index in indices)
            points.append(StepPoint(round, step, len(batches), samples, targets, whole, loss, rate, seconds))
            if on_step:
                on_step(points[-1])
    seconds = time.perf_counter() - started
    return RoundReport(
        samples=sum(map(len, batches)),
        tokens=sum(point.tokens for point in points),
        all_tokens=sum(point.all_tokens for point in points),
        steps=len(points),
        loss=sum(point.loss * point.tokens for point in points) / max(sum(point.tokens for point in points), 1),
        seconds=seconds,
        points=points,
        moments=moments_of(optimizer),
    )


def mean_loss(
    model: LanguageModel,
    tokens: Sequence[Tokens],
    training: ResolvedTraining,
    devices: Devices | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Loss:
    """The model's mean loss over all targets, independent of batch size and number of devices.

    `on_batch` is called after every batch with the number of records so far. Raises TrainingError if there are no
    targets.
    """
    answer_only = training.answer_only_loss
    count = sum(one.targets(answer_only) for one in tokens)
    if not count:
        raise TrainingError("no answer tokens to compute a loss on")
    devices = devices or OneDevice(model, training.precision)
    total, done = torch.zeros((), dtype=torch.float64, device=devices.device), 0
    model.eval()
    with freed_memory_kept(), model.answer_loss.prepared(), torch.no_grad():
        for indices in evaluation_batches(tokens, training.batch_size):
            for part, weight in _parts(devices, tokens, indices, training):
                batch = model.answer_loss.batch([tokens[index] for index in part], answer_only)
                total += weight * devices.loss(batch.to(devices.device))
            done += len(indices)
            if on_batch:
                on_batch(done)
    return Loss(devices.total(total).item() / count, count)


def round_batches(tokens: Sequence[Tokens], plan: SitePlan, round: int, packed: bool) -> list[list[int]]:
    """Indices of the records of each step of a round, over all local epochs; `packed` as in `training_batches`.

    Each round begins with a new shuffle, even if the previous one ended before all records were seen.
    """
    seed, size = _seed(plan, "order"), plan.training.batch_size
    passes = math.ceil(plan.local_epochs)
    epochs = range(round * passes, (round + 1) * passes)
    every = [batch for epoch in epochs for batch in training_batches(tokens, size, seed, epoch, packed)]
    return every[: plan.work.steps(len(tokens))]


def add_gradients(
    devices: Devices, tokens: Sequence[Tokens], indices: Sequence[int], training: ResolvedTraining, targets: int
) -> float:
    """Add the gradient of the batch's mean loss, micro-batch by micro-batch, and return that loss."""
    parts = _parts(devices, tokens, indices, training)
    total = torch.zeros((), device=devices.device)
    make = devices.model.answer_loss.batch
    for number, (part, weight) in enumerate(parts, start=1):
        batch = make([tokens[index] for index in part], training.answer_only_loss).to(devices.device)
        # Devices average their gradients, but the loss is a mean over the tokens of all devices.
        scale = weight * devices.count / max(targets, 1)
        total += devices.add_gradients(batch, scale, last=number == len(parts))
    return devices.total(total).item() / devices.count


def _parts(
    devices: Devices, tokens: Sequence[Tokens], indices: Sequence[int], training: ResolvedTraining
) -> list[tuple[list[int], int]]:
    """This process's micro-batches of a batch, each with its weight: 1, or 0 for one that only keeps processes in step.

    Each process must make as many passes as the one with the most micro-batches.
    """
    packed = devices.model.answer_loss.packs
    limits = (training.micro_batch_size, training.micro_batch_tokens, packed)
    if devices.count == 1:
        return [(part, 1) for part in micro_batches(tokens, indices, *limits)]
    ordered = sorted(indices, key=lambda index: len(tokens[index]))
    shares = [micro_batches(tokens, ordered[rank :: devices.count], *limits) for rank in range(devices.count)]
    own = [(part, 1) for part in shares[devices.rank]]
    idle = max(map(len, shares)) - len(own)
    return own + [(ordered[:1], 0)] * idle


def _learning_rates(plan: SitePlan, round: int, steps: int) -> list[float]:
    training = plan.training
    whole_job = training.learning_rate_schedule == "job"
    first, total = (round * steps, plan.rounds * steps) if whole_job else (0, steps)
    schedule = Schedule(training.learning_rate, total, training.warmup_ratio)
    return [schedule.at(first + step) for step in range(steps)]


@contextmanager
def training_mode(devices: Devices, training: ResolvedTraining, seed: int) -> Iterator[None]:
    """Within the block, the model is in training mode, with the plan's settings; gradients are cleared afterwards."""
    model = devices.model
    model.train()
    if training.activation_checkpointing:
        model.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    try:
        with freed_memory_kept(), model.answer_loss.prepared(), torch.random.fork_rng():
            torch.manual_seed(seed + devices.rank)
            yield
    finally:
        if training.activation_checkpointing:
            model.lm.gradient_checkpointing_disable()
        model.zero_grad(set_to_none=True)


def _seed(plan: SitePlan, purpose: str) -> int:
    """A seed for the site and purpose: sites with equal data must not see it in the same order."""
    return seed_of(f"{plan.seed}/{plan.site}/{purpose}")
