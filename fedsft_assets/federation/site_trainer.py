"""One site's model and data: it scores and trains the models that it is given, and says what it did."""

import time

from nvflare.apis.fl_constant import FLMetaKey
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType

from fedsft_assets.federation.followers import Task
from fedsft_assets.federation.metrics import FIRST_KEY, POINTS_KEY, SAMPLES_KEY, Point, points_to_data
from fedsft_assets.federation.phases import PhaseClock
from fedsft_assets.federation.trainer_log import PROGRESS_MARK
from fedsft_assets.model.archive import content_digest
from fedsft_assets.model.batches import truncated
from fedsft_assets.model.devices import devices_for, resolve_precision
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.optimizer import Moments
from fedsft_assets.model.training import StepPoint, mean_loss, split_tokens, train_round
from fedsft_assets.specs import SitePlan

_SECONDS_BETWEEN_LINES = 5.0


class SiteTrainer:
    """Kept between rounds; `clock` counts where its seconds go."""

    def __init__(self, plan: SitePlan, clock: PhaseClock) -> None:
        self.plan, self.clock = plan, clock
        plan.verify_files()
        self.first_digest: str | None = None
        with clock.phase("load"):
            self.model = LanguageModel.load(plan.base_model)
            if plan.training.peft:
                from fedsft_assets.model.adapters import add_adapters

                # No weights of the base model travel, so only its digest shows that all sites have the same.
                adapters = add_adapters(self.model, plan.training.peft, plan.seed)
                self.first_digest = f"{content_digest(plan.base_model)} {adapters.digest()}"
            self.devices = devices_for(self.model, plan.training)
        with clock.phase("tokenize"):
            length = plan.training.max_length
            self.training = split_tokens(self.model, plan.training_file, length)
            self.validation = split_tokens(self.model, plan.validation_file, length, plan.max_evaluation_records)
        # With adapters, the server has no first model: all sites begin with the same ones of their own.
        self.first = self.devices.weights() if plan.training.peft else {}
        self.samples = 0
        self.moments: Moments | None = None
        self._last_line = 0.0
        self._say(f"{self.devices.device} · precision {resolve_precision(plan.training.precision)} · {self._batches}")
        self._say(f"{len(self.training):,} records to train on · {self._cut}")
        if plan.training.peft:
            trained = sum(tensor.numel() for tensor in self.model.distinct_parameters().values())
            whole = sum(parameter.numel() for parameter in self.model.parameters())
            self._say(f"adapters of rank {plan.training.peft.rank} · {trained:,} of {whole:,} parameters are trained")

    @property
    def _batches(self) -> str:
        if self.model.answer_loss.packs:
            return "batches without padding"
        return f"padded batches, for {type(self.model.lm).__name__} cannot be given records in a row"

    @property
    def _cut(self) -> str:
        contexts, answers = truncated(self.training)
        return (
            f"too long: {contexts:,}, of which {answers:,} lose a part of their answer" if contexts else "none is cut"
        )

    def evaluate(self, received: FLModel) -> FLModel:
        """Score the received weights; nothing is trained."""
        self.devices.load_weights(received.params or self.first)
        point = self._validate("val_loss", received.current_round)
        points = [point, *self.clock.points(received.current_round, self.samples, self.plan.site)]
        return FLModel(metrics={"val_loss": point.value}, meta={POINTS_KEY: points_to_data(points)})

    def train(self, received: FLModel) -> FLModel:
        """Score the received weights, train one round from them, score the result."""
        evaluation = self.evaluate(received)
        finished = received.current_round + 1
        with self.clock.phase("train"):
            report = train_round(
                self.model, self.training, self.plan, received.current_round, self._show, self.moments, self.devices
            )
        self.samples += report.samples
        self.moments = report.moments if self.plan.training.optimizer_state == "keep" else None
        points = [
            Point("train_loss", step.loss, finished, step.samples, self.plan.site, step.step, step.tokens)
            for step in report.points
        ]
        points.append(self._validate("val_loss_local", finished))
        return FLModel(
            params=self.devices.weights(),
            params_type=ParamsType.FULL,
            metrics={**evaluation.metrics, "train_loss": report.loss},
            meta={
                FLMetaKey.NUM_STEPS_CURRENT_ROUND: report.tokens,
                SAMPLES_KEY: report.samples,
                FIRST_KEY: self.first_digest,
                POINTS_KEY: [*evaluation.meta[POINTS_KEY], *points_to_data(points)],
            },
        )

    def follow(self, task: Task) -> None:
        """Take part in what rank 0 does, with the weights that it has been given."""
        received = FLModel(params={}, params_type=ParamsType.FULL, current_round=task.round)
        if task.kind == "train":
            self.train(received)
        else:
            self.evaluate(received)

    def _validate(self, name: str, finished_rounds: int) -> Point:
        with self.clock.phase("validate"):
            loss = mean_loss(self.model, self.validation, self.plan.training, self.devices)
        self._say(f"{name} {loss.loss:.4f} after {finished_rounds} of {self.plan.rounds} rounds")
        return Point(name, loss.loss, finished_rounds, self.samples, self.plan.site, tokens=loss.tokens)

    def _show(self, point: StepPoint) -> None:
        now = time.monotonic()
        if now - self._last_line < _SECONDS_BETWEEN_LINES and point.step < point.steps:
            return
        self._last_line = now
        self._say(
            f"round {point.round + 1} of {self.plan.rounds} · step {point.step} of {point.steps}"
            f" · train_loss {point.loss:.4f}"
        )

    def _say(self, text: str) -> None:
        """One line of progress, found again by whoever follows the log."""
        if self.devices.rank == 0:
            print(f"{PROGRESS_MARK}{self.plan.site} · {text}", flush=True)
