"""One round of training at one site, and the loss of a model on records.

Weights go in and out through the model; what a round does follows from them, the tokens, the plan and
the optimizer's moments alone, so that a restarted round repeats exactly.
"""

import hashlib
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from fedsft_assets.data.records import read_records
from fedsft_assets.model.batches import (
    IGNORED,
    Batch,
    Tokens,
    collate,
    evaluation_batches,
    tokenize,
    training_batches,
)
from fedsft_assets.model.optimizer import Moments, OptimizerPlan
from fedsft_assets.model.sft_model import SFTModel
from fedsft_assets.specs import SitePlan

_PRECISIONS: dict[str, Any] = {"32": "32-true", "bf16-mixed": "bf16-mixed", "16-mixed": "16-mixed"}


class TrainingError(RuntimeError):
    """Training that cannot go on; the model's weights are not to be used."""


@dataclass(frozen=True)
class StepPoint:
    """One optimizer step.

    `round` is 0-based, `step` 1-based within the round's `steps`. `samples` are the records that the
    site has seen in the whole job so far, `tokens` the answer tokens of this step, `loss` their mean
    loss before the step, `seconds` what the step took.
    """

    round: int
    step: int
    steps: int
    samples: int
    tokens: int
    loss: float
    learning_rate: float
    seconds: float


@dataclass(frozen=True)
class RoundReport:
    """A round: records, answer tokens and all tokens (no padding) trained on, and the mean loss by answer token."""

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
        return math.exp(self.loss) if self.loss < 700 else math.inf


def split_tokens(model: SFTModel, records_file: Path, max_length: int, most: int | None = None) -> list[Tokens]:
    """The first `most` records of a JSONL split as tokens for this model, each cut to `max_length`."""
    return tokenize(read_records(records_file)[:most], model.tokenizer, max_length, model.prompt_template)


def steps_in_round(plan: SitePlan, records: int) -> int:
    """Optimizer steps of one round over that many records."""
    steps = plan.local_epochs * math.ceil(records / plan.training.batch_size)
    return min(steps, plan.max_local_steps or steps)


def samples_in_round(plan: SitePlan, records: int) -> int:
    """Records that one round trains on, each pass counted."""
    epochs, steps = divmod(steps_in_round(plan, records), math.ceil(records / plan.training.batch_size))
    return epochs * records + min(steps * plan.training.batch_size, records)


def train_round(
    model: SFTModel,
    tokens: Sequence[Tokens],
    plan: SitePlan,
    round: int,
    on_step: Callable[[StepPoint], None] | None = None,
    moments: Moments | None = None,
) -> RoundReport:
    """Train the model in place for one round (0-based).

    The learning rate follows one schedule over all rounds. `on_step` is called after every step.
    `moments` are those that the report of the round before has, for an optimizer that goes on; without
    them it starts anew.
    Raises TrainingError that names site, round and step if there is no record or a loss is not finite.
    """
    if not tokens:
        raise TrainingError(f"{plan.site}: no records to train on in {plan.training_file}")
    training, steps = plan.training, steps_in_round(plan, len(tokens))
    model.plan_optimizer(
        OptimizerPlan(
            learning_rate=training.learning_rate,
            total_steps=plan.rounds * steps,
            first_step=round * steps,
            warmup_ratio=training.warmup_ratio,
            weight_decay=training.weight_decay,
            fused=training.precision != "16-mixed",
        ),
        moments,
    )
    batches = _RoundBatches(tokens, plan, round, pad=model.tokenizer.pad_token_id)
    record = _Record(plan, round, steps, samples_in_round(plan, len(tokens)) * round, on_step)
    with _quiet_lightning(), torch.random.fork_rng():
        torch.manual_seed(_seed(plan, f"dropout of round {round}"))
        trainer = Trainer(
            accelerator="auto",
            devices=1,
            precision=_PRECISIONS[training.precision],
            gradient_clip_val=training.gradient_clip or None,
            max_steps=steps,
            max_epochs=-1,
            callbacks=[record],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
        )
        model.set_trainer(trainer)
        # Lightning trains modules in the mode it finds them in, and validation leaves evaluation mode.
        model.train()
        started = time.perf_counter()
        try:
            trainer.fit(model, train_dataloaders=batches)
            moments = trainer.optimizers[0].state_dict()["state"]
        finally:
            model.set_trainer(None)
            model.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    answer_tokens = sum(point.tokens for point in record.points)
    return RoundReport(
        samples=sum(len(batch) for batch in batches.indices),
        tokens=answer_tokens,
        all_tokens=sum(len(tokens[index]) for batch in batches.indices for index in batch),
        steps=len(record.points),
        loss=sum(point.loss * point.tokens for point in record.points) / max(answer_tokens, 1),
        seconds=seconds,
        points=record.points,
        moments=moments or {},
    )


def mean_loss(model: SFTModel, tokens: Sequence[Tokens], batch_size: int) -> Loss:
    """The model's mean loss over all answer tokens: the same for every batch size.

    Raises TrainingError if there is no record.
    """
    total, count = 0.0, 0
    pad = model.tokenizer.pad_token_id
    with model.evaluating() as device, torch.no_grad():
        for indices in evaluation_batches(tokens, batch_size):
            batch = collate([tokens[index] for index in indices], pad)
            loss, answers = model.answer_loss(Batch(*(tensor.to(device) for tensor in batch)))
            total += loss.item()
            count += answers
    if not count:
        raise TrainingError("no answer tokens to take a loss over")
    return Loss(total / count, count)


class _RoundBatches:
    """The batches of a round, all local epochs in a row; made when they are needed."""

    def __init__(self, tokens: Sequence[Tokens], plan: SitePlan, round: int, pad: int) -> None:
        self.tokens, self.pad = tokens, pad
        seed = _seed(plan, "order")
        epochs = range(round * plan.local_epochs, (round + 1) * plan.local_epochs)
        every = [batch for epoch in epochs for batch in training_batches(tokens, plan.training.batch_size, seed, epoch)]
        self.indices = every[: plan.max_local_steps]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.indices:
            yield collate([self.tokens[index] for index in batch], self.pad)


class _Record(Callback):
    """Turns each step into a StepPoint, and stops at a loss that is not finite."""

    def __init__(
        self, plan: SitePlan, round: int, steps: int, samples: int, on_step: Callable[[StepPoint], None] | None
    ) -> None:
        self.plan, self.round, self.steps, self.samples, self.on_step = plan, round, steps, samples, on_step
        self.points: list[StepPoint] = []
        self.started = 0.0
        self.learning_rate = 0.0

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.started = time.perf_counter()
        self.learning_rate = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(self, _trainer: Any, _module: Any, outputs: Any, batch: Batch, *_: Any) -> None:
        loss = outputs["loss"].item()
        self.samples += len(batch.input_ids)
        point = StepPoint(
            round=self.round,
            step=len(self.points) + 1,
            steps=self.steps,
            samples=self.samples,
            tokens=int((batch.labels[:, 1:] != IGNORED).sum()),
            loss=loss,
            learning_rate=self.learning_rate,
            seconds=time.perf_counter() - self.started,
        )
        if not math.isfinite(loss):
            raise TrainingError(
                f"{self.plan.job}, {self.plan.site}: the loss is {loss} in round {self.round}, step {point.step} of"
                f" {self.steps}, at learning rate {self.learning_rate:.3g}; try a lower one or precision 32"
            )
        self.points.append(point)
        if self.on_step:
            self.on_step(point)


def _seed(plan: SitePlan, purpose: str) -> int:
    """A seed of the site's own for each purpose: sites with equal data must not see it in equal order."""
    return int.from_bytes(hashlib.sha256(f"{plan.seed}/{plan.site}/{purpose}".encode()).digest()[:8], "big") >> 1


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Lightning advises on loggers and worker processes, and reports hardware, once a round."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        logger.setLevel(level)
