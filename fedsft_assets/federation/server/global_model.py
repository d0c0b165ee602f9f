"""The global model of a job, and how results of sites become the next one, tensor by tensor."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fedsft_assets.federation.protocol.messages import Kind, Wire
from fedsft_assets.federation.server.aggregation import TokenWeightedAverage
from fedsft_assets.federation.server.base_model import own_base_model, read_nemo_weights
from fedsft_assets.federation.server.optimizer import ServerOptimizer
from fedsft_assets.federation.server.site_update import SiteUpdate
from fedsft_assets.federation.server.state import ServerState
from fedsft_assets.federation.transport import MAX_GAP, Delta, rounded
from fedsft_assets.memory import collect_messages, give_back_freed_memory

_FLOAT32 = 4  # bytes


class GlobalModel:
    """Weights by their names, none before the first round of a job whose sites begin with adapters of their own.

    `change` is what the last round added, where that travels instead of the weights. `control` is SCAFFOLD's: the usual
    direction of all sites together.
    """

    def __init__(self, state: ServerState, wire: Wire, algorithm: Mapping[str, Any], sites: int) -> None:
        """`sites` is how many the job has."""
        self._state, self.wire, self._algorithm, self._sites = state, wire, algorithm, sites
        self.weights: Mapping[str, torch.Tensor] = {}
        self.change: dict[str, torch.Tensor] = {}
        self.control: dict[str, torch.Tensor] = {}
        self._optimizer: ServerOptimizer | None = None
        self._holders: set[str] = set()  # sites with the model to which `change` is to be added

    def load(self, base_model: str | None) -> None:
        """The model after the last finished round, or else the base model."""
        if self._state.progress.finished:
            self.weights = self._state.weights()
        elif base_model:
            weights = read_nemo_weights(own_base_model(Path(base_model), os.environ))
            self.weights = self._state.write_weights(0, weights, weights.pop)  # there they take no memory
            give_back_freed_memory()
        if self.uses_directions:
            self.control = self._state.algorithm()

    @property
    def uses_directions(self) -> bool:
        """Whether sites send control variates beside their changes."""
        return bool(self._algorithm["name"] == "scaffold")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]] | None:
        """Of all tensors, if there is a model."""
        return {name: tuple(tensor.shape) for name, tensor in self.weights.items()} or None

    @property
    def largest_result(self) -> int | None:
        """Bytes of the tensors of a result, at most: a change and a direction. None before there is a model."""
        size = sum(max(weight.element_size(), _FLOAT32) * weight.numel() for weight in self.weights.values())
        return 2 * size + 2 * MAX_GAP * len(self.weights) if self.weights else None

    def recipients(self, connected: set[str]) -> dict[Kind, list[str]]:
        """Who gets what: the last change is for sites that have the model to which it is added."""
        holders = self._holders & connected if self.change else set()
        groups = {Kind.CHANGE: sorted(holders), Kind.FULL: sorted(connected - holders)}
        return {kind: sites for kind, sites in groups.items() if sites}

    def tensors(self, kind: Kind) -> dict[str, torch.Tensor]:
        """What a task of that kind carries."""
        return {**(self.weights if kind == Kind.FULL else self.change), **self.control}

    def move(self, updates: Mapping[str, SiteUpdate]) -> None:
        """Make the next global model of the sites' updates, which are let go of, and write it."""
        average, directions = TokenWeightedAverage(self.shapes), TokenWeightedAverage()
        for site, update in updates.items():
            average.add(site, update.take_tensors(), update.message.tokens, whole=update.message.kind == Kind.FULL)
            if update.directions:
                directions.add(site, update.take_directions(), 1)
        self.apply(average)
        self._update_control_variate(directions)
        self._holders = set(updates)

    def kept(self) -> dict[str, torch.Tensor]:
        """What the algorithm carries on, to be found again by another server."""
        return self._optimizer.kept() if self._optimizer else self.control

    def apply(self, average: TokenWeightedAverage) -> None:
        """Make the next global model of the averaged changes and write it, one tensor after the other."""
        self.change = {}
        collect_messages()  # the last task holds the change that it was sent with
        give_back_freed_memory()
        number = self._state.progress.finished + 1
        if not self.weights:
            first = dict(average.tensors())
            self.weights = self._state.write_weights(number, first, first.__getitem__)
            return
        if self._algorithm["name"] == "fedopt" and self._optimizer is None:
            self._optimizer = ServerOptimizer(dict(self._algorithm), self.weights, self._state.algorithm())

        def moved(name: str) -> torch.Tensor:
            weight, mean = self.weights[name], average.mean(name)
            if mean is None:
                return weight
            change = rounded(self._optimizer.change(name, mean) if self._optimizer else mean, self.wire)
            if self.wire == Wire.BF16_DIFF:
                self.change[name] = Delta(change, name, number)
            return weight.add(change).to(weight.dtype)

        self.weights = self._state.write_weights(number, self.weights, moved)
        average.clear()
        give_back_freed_memory()

    def _update_control_variate(self, directions: TokenWeightedAverage) -> None:
        """Move the direction of all sites by what those that answered changed of theirs."""
        share = len(directions.sites) / self._sites
        for name, mean in directions.tensors():
            change = mean.mul_(share)
            self.control[name] = self.control[name].add_(change) if name in self.control else change
