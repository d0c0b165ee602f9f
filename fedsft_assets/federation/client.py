"""What runs at a site: receive the global weights, evaluate, train, evaluate, send.

NVFlare starts this module as a process of its own. It needs NVFlare and `fedsft_assets.model`, nothing
of Dagster or MLflow. What the site is told stands in one file of the job folder, `plan.json`.
"""

import argparse
import json
import sys
import time
import traceback
from pathlib import Path

import nvflare.client as flare
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType

from fedsft_assets.federation.metrics import POINTS_KEY, SAMPLES_KEY, Point, points_to_data
from fedsft_assets.federation.trainer_log import FAILURE_MARK, PROGRESS_MARK
from fedsft_assets.model.optimizer import Moments
from fedsft_assets.model.sft_model import SFTModel
from fedsft_assets.model.training import StepPoint, mean_loss, split_tokens, train_round
from fedsft_assets.specs import SitePlan

_SECONDS_BETWEEN_LINES = 5.0


class SiteTrainer:
    """One site's model and data, kept between rounds."""

    def __init__(self, plan: SitePlan) -> None:
        self.plan = plan
        plan.verify_files()
        self.model = SFTModel.load(plan.base_model)
        length = plan.training.max_length
        self.training = split_tokens(self.model, plan.training_file, length)
        self.validation = split_tokens(self.model, plan.validation_file, length, plan.max_evaluation_records)
        self.samples = 0
        self.moments: Moments | None = None
        self._last_line = 0.0

    def evaluate(self, received: FLModel) -> FLModel:
        """Score the received weights; nothing is trained."""
        self.model.load_weights(received.params)
        point = self._validate("val_loss", received.current_round)
        return FLModel(metrics={"val_loss": point.value}, meta={POINTS_KEY: points_to_data([point])})

    def train(self, received: FLModel) -> FLModel:
        """Score the received weights, train one round from them, score the result."""
        evaluation = self.evaluate(received)
        finished = received.current_round + 1
        report = train_round(self.model, self.training, self.plan, received.current_round, self._show, self.moments)
        self.samples += report.samples
        self.moments = report.moments if self.plan.training.optimizer_state == "keep" else None
        points = [
            Point("train_loss", step.loss, finished, step.samples, self.plan.site, step.step, step.tokens)
            for step in report.points
        ]
        points.append(self._validate("val_loss_local", finished))
        return FLModel(
            params=self.model.weights(),
            params_type=ParamsType.FULL,
            metrics={**evaluation.metrics, "train_loss": report.loss},
            meta={
                FLMetaKey.NUM_STEPS_CURRENT_ROUND: report.tokens,
                SAMPLES_KEY: report.samples,
                POINTS_KEY: [*evaluation.meta[POINTS_KEY], *points_to_data(points)],
            },
        )

    def _validate(self, name: str, finished_rounds: int) -> Point:
        loss = mean_loss(self.model, self.validation, self.plan.training.batch_size)
        say(f"{self.plan.site} · {name} {loss.loss:.4f} after {finished_rounds} of {self.plan.rounds} rounds")
        return Point(name, loss.loss, finished_rounds, self.samples, self.plan.site, tokens=loss.tokens)

    def _show(self, point: StepPoint) -> None:
        now = time.monotonic()
        if now - self._last_line < _SECONDS_BETWEEN_LINES and point.step < point.steps:
            return
        self._last_line = now
        say(
            f"{self.plan.site} · round {point.round + 1} of {self.plan.rounds} · step {point.step} of {point.steps}"
            f" · train_loss {point.loss:.4f}"
        )


def say(text: str) -> None:
    """One line of progress, found again by whoever follows the log."""
    print(f"{PROGRESS_MARK}{text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train at one site of a job.")
    parser.add_argument("--plan", type=Path, required=True, help="the site's plan.json")
    plan = SitePlan.model_validate_json(parser.parse_args().plan.read_text(encoding="utf-8"))
    try:
        flare.init()
        trainer = SiteTrainer(plan)
        while flare.is_running():
            received = flare.receive()
            if received is None:
                break
            flare.send(trainer.evaluate(received) if flare.is_evaluate() else trainer.train(received))
    except Exception:
        print(f"{FAILURE_MARK}{json.dumps(traceback.format_exc())}", flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
