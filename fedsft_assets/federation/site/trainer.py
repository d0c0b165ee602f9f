"""Trains and scores the models that a site receives, on its own data, and reports progress."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType

from fedsft_assets.federation.protocol.messages import (
    CONTROL,
    EXECUTIONS_KEY,
    FIRST_KEY,
    KIND_KEY,
    RECORDS_KEY,
    SAMPLES_KEY,
    TOKENS_KEY,
    Kind,
    Wire,
)
from fedsft_assets.federation.protocol.meter import Meter
from fedsft_assets.federation.protocol.phases import PhaseClock
from fedsft_assets.federation.protocol.points import TRAIN_LOSS, VAL_LOSS, VAL_LOSS_LOCAL, Point
from fedsft_assets.federation.site.global_model import ExchangeError, SiteExchange, Weight
from fedsft_assets.federation.site.precision import site_precision
from fedsft_assets.federation.site.ranks import Task
from fedsft_assets.federation.site.state import SiteState
from fedsft_assets.federation.site.update_filters import ChangeFilter
from fedsft_assets.federation.transport import rounded
from fedsft_assets.model.archive.nemo_archive import content_digest
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.training.batches import truncated
from fedsft_assets.model.training.devices.choose import devices_for
from fedsft_assets.model.training.drift_correction import ControlVariates, Correction, Proximal
from fedsft_assets.model.training.local_training import StepPoint, mean_loss, split_tokens, train_round
from fedsft_assets.model.training.optimizer import Moments
from fedsft_assets.specs.job import FedProx, Scaffold
from fedsft_assets.specs.plan import SitePlan

Tensors = dict[str, torch.Tensor]

# Reports a log line and its metric points.
Tell = Callable[[str, list[Point]], None]

_SECONDS_BETWEEN_LINES = 5.0


class SiteTrainer:
    """Lives across rounds; `clock` accounts for time by phase, `meter` for the rest, `tell` receives progress.

    `state` is the folder from which a restarted trainer resumes.
    """

    def __init__(
        self, plan: SitePlan, clock: PhaseClock, tell: Tell, state: Path | None = None, meter: Meter | None = None
    ) -> None:
        self.plan, self.clock, self._tell = plan, clock, tell
        self._meter = meter or Meter()
        self.first_digest: str | None = None
        self._wire = Wire(plan.wire)
        with clock.phase("load"):
            self.model = LanguageModel.load(plan.base_model)
            if plan.training.peft:
                from fedsft_assets.model.training.lora import add_adapters

                # Base model weights are not exchanged, so a digest must show that all sites have the same ones.
                adapters = add_adapters(self.model, plan.training.peft, plan.seed)
                self.first_digest = f"{content_digest(plan.base_model)} {adapters.digest()}"
                trained = adapters.description()
        with clock.phase("tokenize"):
            length = plan.training.max_length
            self.training = split_tokens(self.model, plan.training_file, length)
            self.validation = split_tokens(self.model, plan.validation_file, length, plan.max_evaluation_records)
        with clock.phase("load"):
            precision, why = site_precision(self.model, self.training, plan, state, self._wait)
            self.devices = devices_for(self.model, plan.training.model_copy(update={"precision": precision}))
        # With adapters, the server has no initial model: each site initializes the same adapters itself.
        first = dict(self.devices.weights()) if plan.training.peft else {}
        self.moments: Moments | None = None
        self._filter = ChangeFilter(plan.filters)
        self.exchange = SiteExchange(plan.site, Wire(plan.wire), self._filter, first)
        self._state = SiteState(state, self.devices.rank) if state else None
        self._finished = 0  # number of rounds behind `moments` and `_control`
        self._released = 0  # rounds whose changes may have been released, or are skipped in this job
        self._control: Tensors = {}  # this site's control variate (SCAFFOLD)
        self._unsaid: list[Point] = []
        self._last_line, self._tokens_since = time.monotonic(), 0
        self._say(f"{self.devices.device} · precision {precision}{why and f' ({why})'} · {self._batches}")
        self._say(f"{len(self.training):,} records to train on · {self._cut}")
        if plan.training.peft:
            self._say(trained)
        if router := self.model.answer_loss.router:
            self._say(f"training includes the router's load-balancing loss, weighted by {router:g}")

    def _wait(self) -> None:
        self._tell("waiting for a CPU slot", [])

    @property
    def _batches(self) -> str:
        if self.model.answer_loss.packs:
            return "batches without padding"
        return f"padded batches: {type(self.model.lm).__name__} does not support packed records"

    @property
    def _cut(self) -> str:
        contexts, answers = truncated(self.training)
        return f"{contexts:,} records truncated, {answers:,} answers" if contexts else "no record truncated"

    def evaluate(self, received: FLModel) -> FLModel:
        """Score the received weights; no training follows."""
        result = self._evaluate(received)
        if self._state:
            self._state.clear()
        return result

    def _evaluate(self, received: FLModel) -> FLModel:
        self._forget_others(received)
        self._take(received)
        return FLModel(metrics={VAL_LOSS: self._validate(VAL_LOSS, received.current_round)})

    def train(self, received: FLModel) -> FLModel:
        """Score the received weights, train one round from them, and score the result."""
        self._require_countable(received.current_round)
        kind = Kind.CHANGE if received.params else Kind.FULL
        evaluation = self._evaluate(received)
        self._go_on_after(received.current_round)
        finished = received.current_round + 1
        correction = self._correction()
        self._last_line, self._tokens_since = time.monotonic(), 0
        with self.clock.phase("train"):
            report = train_round(
                self.model,
                self.training,
                self.plan,
                received.current_round,
                self._show,
                self.moments,
                self.devices,
                correction=correction,
            )
        self.moments = report.moments if self.plan.training.optimizer_state == "keep" else None
        control = self._control_changes(correction)
        self._keep(finished)
        self._validate(VAL_LOSS_LOCAL, finished)
        return FLModel(
            params={**self.exchange.changes(self._weights(), kind), **control},
            params_type=ParamsType.FULL,
            metrics={**evaluation.metrics, TRAIN_LOSS: report.loss},
            meta={
                KIND_KEY: str(kind),
                TOKENS_KEY: report.tokens,
                SAMPLES_KEY: report.samples,
                RECORDS_KEY: len(self.training),
                FIRST_KEY: self.first_digest,
            },
        )

    def follow(self, task: Task) -> None:
        """Run the same task as rank 0, with the weights that rank 0 received."""
        received = FLModel(params={}, params_type=ParamsType.FULL, current_round=task.round)
        if task.kind == "train":
            self.train(received)
        else:
            self.evaluate(received)

    def _forget_others(self, received: FLModel) -> None:
        if self._state and self.devices.rank == 0 and EXECUTIONS_KEY in received.meta:
            self._state.clear_others(received.meta[EXECUTIONS_KEY])

    def _take(self, received: FLModel) -> None:
        """Load the global model, received in full or as a change to the current one."""
        if self.devices.rank == 0 and received.params:
            self.exchange.take(received)
        self.devices.load_weights(self.exchange.weights())

    def _weights(self) -> dict[str, Weight]:
        """Functions that copy slices of the weights. With several devices the weights are gathered first."""
        if self.devices.count > 1:
            return {name: _copies_of(tensor) for name, tensor in self.devices.weights()}
        return {name: _copies_of(weight.detach()) for name, weight in self.model.distinct_parameters().items()}

    def _correction(self) -> Correction | None:
        match self.plan.algorithm:
            case FedProx(mu=mu):
                return Proximal(mu)
            case Scaffold():
                return ControlVariates(self.exchange.control, self._control)
        return None

    def _control_changes(self, correction: Correction | None) -> Tensors:
        """Update this site's control variate and return the change to send."""
        if not isinstance(correction, ControlVariates):
            return {}
        changes = {name: rounded(change, self._wire) for name, change in correction.changes().items()}
        for name, change in changes.items():
            self._control[name] = self._control[name] + change if name in self._control else change.float()
        return {f"{CONTROL}{name}": change for name, change in changes.items() if self._filter.keeps(name)}

    def _require_countable(self, round: int) -> None:
        """Check that each round's noisy change is released at most once: privacy is accounted per round.

        Raises ExchangeError.
        """
        if self.plan.filters.privacy is None:
            return
        if not self._released <= round < self.plan.rounds:
            raise ExchangeError(
                f"{self.plan.site}: the server requested the change of round {round + 1} of {self.plan.rounds} after"
                f" that of round {self._released}; filters.privacy releases each round's change only once"
            )
        self._released = round + 1

    def _go_on_after(self, finished_rounds: int) -> None:
        """Restore this site's state after `finished_rounds`, from memory or from disk."""
        if finished_rounds == self._finished:
            return
        kept = self._state.load(finished_rounds, self.devices.device) if self._state and finished_rounds else {}
        self._finished, self.moments, self._control = finished_rounds, None, {}
        if kept is None:
            if self._keeps_something:
                self._say(f"resetting the optimizer after round {finished_rounds}: no saved state at this site")
            return
        self.moments = kept.get("moments")
        self._control = {name: tensor.cpu() for name, tensor in kept.get("control", {}).items()}

    def _keep(self, finished_rounds: int) -> None:
        self._finished = finished_rounds
        if self._state and self._keeps_something:
            self._state.save(finished_rounds, {"moments": self.moments, "control": self._control})

    @property
    def _keeps_something(self) -> bool:
        return self.moments is not None or self.plan.training.optimizer_state == "keep" or bool(self._control)

    def _samples(self, finished_rounds: int) -> int:
        """Records that this site has trained on after `finished_rounds`."""
        return self.plan.work.samples(len(self.training)) * finished_rounds

    def _validate(self, name: str, finished_rounds: int) -> float:
        with self.clock.phase("validate"):
            loss = mean_loss(self.model, self.validation, self.plan.training, self.devices, self._show_validated)
        samples = self._samples(finished_rounds)
        points = [Point(name, loss.loss, finished_rounds, samples, self.plan.site, tokens=loss.tokens)]
        if name == VAL_LOSS:  # the costs of all that came before
            points += self.clock.points(finished_rounds, samples, self.plan.site)
            points += self._meter.read_all().points(finished_rounds, samples, self.plan.site)
        self._say(f"{name} {loss.loss:.4f} after {finished_rounds} of {self.plan.rounds} rounds", points)
        return loss.loss

    def _show(self, step: StepPoint) -> None:
        self._unsaid.append(self._step_point(step))
        self._tokens_since += step.all_tokens
        seconds = time.monotonic() - self._last_line
        if seconds >= _SECONDS_BETWEEN_LINES or step.step == step.steps:
            points, self._unsaid = self._unsaid, []
            self._say(
                f"round {step.round + 1} of {self.plan.rounds} · step {step.step} of {step.steps}"
                f" · train_loss {step.loss:.4f} · {self._tokens_since / seconds:,.0f} tokens/s",
                points,
            )

    def _show_validated(self, records: int) -> None:
        if time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._say(f"validated {records:,} of {len(self.validation):,} records")

    def _step_point(self, step: StepPoint) -> Point:
        return Point(TRAIN_LOSS, step.loss, step.round + 1, step.samples, self.plan.site, step.step, step.tokens)

    def _say(self, text: str, points: list[Point] | None = None) -> None:
        self._last_line, self._tokens_since = time.monotonic(), 0
        self._meter.read()  # noted in its file
        if self.devices.rank == 0:
            self._tell(text, points or [])


def _copies_of(weight: torch.Tensor) -> Weight:
    dtype = torch.float32 if weight.is_floating_point() else weight.dtype
    return lambda first, last: weight.reshape(-1)[first:last].to("cpu", dtype, copy=True)
