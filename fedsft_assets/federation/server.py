"""What runs at the server: the token-weighted average, and the FedAvg loop that evaluates what it makes.

It needs torch and NVFlare only. Nothing of the model is built here: weights are tensors with names.
"""

import os
import tarfile
from collections import defaultdict
from pathlib import Path

import torch
from nvflare.apis.fl_constant import FLMetaKey
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType
from nvflare.app_common.aggregators.model_aggregator import ModelAggregator
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.app_opt.pt.decomposers import TensorDecomposer
from nvflare.fuel.utils import fobs

from fedsft_assets.federation.metrics import (
    FIRST_KEY,
    METRICS_FILE,
    POINTS_KEY,
    SAMPLES_KEY,
    Point,
    append_points,
    points_from_data,
)

TRAIN_TASK = "train"
VALIDATE_TASK = "validate"
LAST_MODEL = "last_global_model.pt"
BEST_MODEL = "best_global_model.pt"


class TokenWeightedAverage(ModelAggregator):
    """Mean of the sites' weights, each weighted by the answer tokens that the site trained on.

    Sums are kept in float64, tensor by tensor as results arrive, so the result does not depend on the
    order of arrival, and is handed on in float32.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reset_stats()

    def reset_stats(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._weight = 0
        self.results: list[FLModel] = []

    def accept_model(self, model: FLModel) -> None:
        """Add one site's result.

        Raises ValueError for a result without a positive number of tokens, or from a site that began the job elsewhere
        than the others.
        """
        site = model.meta["client_name"]
        weight = model.meta.get(FLMetaKey.NUM_STEPS_CURRENT_ROUND)
        if not isinstance(weight, int) or weight <= 0:
            raise ValueError(f"{site}: expected the number of answer tokens it trained on, found {weight!r}")
        if self._sums and (differ := _shapes(self._sums) ^ _shapes(model.params)):
            odd = sorted({name for name, _ in differ})
            raise ValueError(f"{site}: tensors differ from those of the other sites: {', '.join(odd[:5])}")
        for other in self.results[:1]:
            if other.meta.get(FIRST_KEY) != model.meta.get(FIRST_KEY):
                raise ValueError(
                    f"{site}: began with another base model or other adapters than {other.meta['client_name']};"
                    " all sites need the same base model and the same version of this package"
                )
        for name in list(model.params):
            value = model.params.pop(name).to(torch.float64).mul_(weight)
            if name in self._sums:
                self._sums[name] += value
            else:
                self._sums[name] = value
        self._weight += weight
        self.results.append(model)

    def aggregate_model(self) -> FLModel:
        sums, self._sums = self._sums, {}
        mean = {name: (sums.pop(name) / self._weight).to(torch.float32) for name in list(sums)}
        return FLModel(params=mean, params_type=ParamsType.FULL)


class FederatedSFT(FedAvg):
    """FedAvg that starts from a `.nemo` base model, writes every point down, and keeps the best and the last model.

    Without `base_model` the first model is empty: each site then begins with adapters of its own, all the same.
    A round's `val_loss` is that of the global model that the sites received, so a model is scored one
    round after it was made, and the last one in a validation task of its own.
    """

    def __init__(self, num_clients: int, num_rounds: int, base_model: str | None = None) -> None:
        super().__init__(
            num_clients=num_clients,
            num_rounds=num_rounds,
            persistor_id="",
            aggregator=TokenWeightedAverage(),
            task_name=TRAIN_TASK,
            ignore_result_error=False,
        )
        self.base_model = base_model
        self._samples: defaultdict[str, int] = defaultdict(int)
        self._best_loss = float("inf")
        self._model: FLModel | None = None

    def run(self) -> None:
        super().run()
        if self._model is None or self.abort_signal.triggered:
            return
        self._model.current_round = self.num_rounds
        results = self.send_model_and_wait(
            task_name=VALIDATE_TASK, data=self._model, targets=self.sample_clients(self.num_clients)
        )
        if not self.abort_signal.triggered:
            self._record_received_model(self.num_rounds, results)

    def load_model(self) -> FLModel:
        fobs.register(TensorDecomposer)  # without it, NVFlare cannot send tensors
        first = read_nemo_weights(Path(self.base_model)) if self.base_model else {}
        return FLModel(params=first, params_type=ParamsType.FULL)

    def save_model(self, model: FLModel) -> None:
        """End a round: write down what the sites report, then the new global model."""
        assert isinstance(self.aggregator, TokenWeightedAverage)
        results = self.aggregator.results
        self._record_received_model(self.current_round, results)
        self._record_training(self.current_round + 1, results)
        _write_weights(model.params, self._run_dir / LAST_MODEL)
        self._model = model

    def _aggregate_one_result(self, result: FLModel) -> bool:
        """NVFlare logs and drops what a callback raises; a result that cannot be used ends the job instead."""
        try:
            return super()._aggregate_one_result(result)
        except Exception as error:
            self.panic(f"round {self.current_round + 1}: {error}")
            raise

    @property
    def _run_dir(self) -> Path:
        return Path(self.get_run_dir())

    def _record_received_model(self, finished_rounds: int, results: list[FLModel]) -> None:
        """Score the global model after so many rounds, which is still the last one on the disk."""
        points = [point for result in results for point in points_from_data(result.meta[POINTS_KEY])]
        received = [point for point in points if point.name == "val_loss"]
        loss, _ = _mean(received)
        whole = Point("val_loss", loss, finished_rounds, sum(self._samples.values()))
        append_points(self._run_dir / METRICS_FILE, [whole, *points])
        self.info(f"val_loss {loss:.4f} after {finished_rounds} rounds")
        if finished_rounds > 0 and loss < self._best_loss:
            self._best_loss = loss
            _link(self._run_dir / LAST_MODEL, self._run_dir / BEST_MODEL)

    def _record_training(self, round_number: int, results: list[FLModel]) -> None:
        """Merge the sites' steps of one round into one curve over the samples that all of them saw."""
        by_step: defaultdict[int, list[Point]] = defaultdict(list)
        for result in results:
            for point in points_from_data(result.meta[POINTS_KEY]):
                if point.name == "train_loss" and point.step is not None:
                    by_step[point.step].append(point)
        seen = dict(self._samples)
        merged = []
        for step, points in sorted(by_step.items()):
            seen.update({point.site: point.samples for point in points if point.site})
            loss, tokens = _mean(points)
            merged.append(Point("train_loss", loss, round_number, sum(seen.values()), step=step, tokens=tokens))
        for result in results:
            self._samples[result.meta["client_name"]] += result.meta[SAMPLES_KEY]
        append_points(self._run_dir / METRICS_FILE, merged)


def read_nemo_weights(archive: Path) -> dict[str, torch.Tensor]:
    """The state dict of a `.nemo` archive in float32, every shared tensor once, under its first name.

    Only tensors are unpickled. Raises FileNotFoundError, or ValueError for an archive without weights.
    """
    with tarfile.open(archive) as tar:
        member = next((m for m in tar.getmembers() if Path(m.name).name == "model_weights.ckpt"), None)
        file = tar.extractfile(member) if member else None
        if file is None:
            raise ValueError(f"{archive}: has no model_weights.ckpt; is it a .nemo archive?")
        state = torch.load(file, map_location="cpu", weights_only=True)
    unique: dict[str, torch.Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in state.items():
        identity = (tensor.data_ptr(), tensor.shape)
        if identity not in seen:
            seen.add(identity)
            unique[name] = tensor.to(torch.float32)
    return unique


def _shapes(tensors: dict[str, torch.Tensor]) -> set[tuple[str, torch.Size]]:
    return {(name, tensor.shape) for name, tensor in tensors.items()}


def _mean(points: list[Point]) -> tuple[float, int]:
    """The mean of the points' values by the tokens behind them, and all these tokens."""
    tokens = sum(point.tokens or 0 for point in points)
    return sum(point.value * (point.tokens or 0) for point in points) / tokens, tokens


def _write_weights(weights: dict[str, torch.Tensor], path: Path) -> None:
    fresh = path.with_suffix(".new")
    torch.save(weights, fresh)
    os.replace(fresh, path)


def _link(source: Path, target: Path) -> None:
    """Make `target` the present content of `source` at no cost: writers replace files, never change them."""
    fresh = target.with_suffix(".new")
    fresh.unlink(missing_ok=True)
    os.link(source, fresh)
    os.replace(fresh, target)
