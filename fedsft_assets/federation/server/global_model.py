"""The global model of a job, updated from site results one tensor at a time."""

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
    """Named weights; empty before the first round of a job whose sites initialize their own adapters.

    `change` is the update of the last round, if updates are sent instead of weights. `control` is SCAFFOLD's global
    control variate.
    """

    def __init__(self, state: ServerState, wire: Wire, algorithm: Mapping[str, Any], sites: int) -> None:
        """`sites` is the number of sites in the job."""
        self._state, self.wire, self._algorithm, self._sites = state, wire, algorithm, sites
        self.weights: Mapping[str, torch.Tensor] = {}
        self.change: dict[str, torch.Tensor] = {}
        self.control: dict[str, torch.Tensor] = {}
        self._optimizer: ServerOptimizer | None = None
        self._holders: set[str] = set()  # sites that hold the model that `change` applies to

    def load(self, base_model: str | None) -> None:
        """Load the model of the last finished round, or else the base model."""
        if self._state.progress.finished:
            self.weights = self._state.weights()
        elif base_model:
            weights = read_nemo_weights(own_base_model(Path(base_model), os.environ))
            self.weights = self._state.write_weights(0, weights, weights.pop)  # memory-mapped: takes no RAM
            give_back_freed_memory()
        if self.uses_directions:
            self.control = self._state.algorithm()

    @property
    def uses_directions(self) -> bool:
        """Whether sites send control variates with their updates."""
        return bool(self._algorithm["name"] == "scaffold")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]] | None:
        """Tensor shapes by name, or None if there is no model yet."""
        return {name: tuple(tensor.shape) for name, tensor in self.weights.items()} or None

    @property
    def largest_result(self) -> int | None:
        """Maximum size of a result in bytes: an update and a control variate. None if there is no model yet."""
        size = sum(max(weight.element_size(), _FLOAT32) * weight.numel() for weight in self.weights.values())
        return 2 * size + 2 * MAX_GAP * len(self.weights) if self.weights else None

    def recipients(self, connected: set[str]) -> dict[Kind, list[str]]:
        """Sites by what they are sent: the last change if they hold the model before it, otherwise the full model."""
        holders = self._holders & connected if self.change else set()
        groups = {Kind.CHANGE: sorted(holders), Kind.FULL: sorted(connected - holders)}
        return {kind: sites for kind, sites in groups.items() if sites}

    def tensors(self, kind: Kind) -> dict[str, torch.Tensor]:
        """The tensors to send with a task of this kind."""
        return {**(self.weights if kind == Kind.FULL else self.change), **self.control}

    def move(self, updates: Mapping[str, SiteUpdate]) -> None:
        """Compute the next global model from the sites' updates, releasing them, and write it to disk."""
        average, directions = TokenWeightedAverage(self.shapes), TokenWeightedAverage()
        for site, update in updates.items():
            average.add(site, update.take_tensors(), update.message.tokens, whole=update.message.kind == Kind.FULL)
            if update.directions:
                directions.add(site, update.take_directions(), 1)
        self.apply(average)
        self._update_control_variate(directions)
        self._holders = set(updates)

    def kept(self) -> dict[str, torch.Tensor]:
        """Algorithm state to save for a restarted server."""
        return self._optimizer.kept() if self._optimizer else self.control

    def apply(self, average: TokenWeightedAverage) -> None:
        """Apply the averaged changes and write the next global model, one tensor at a time."""
        self.change = {}
        collect_messages()  # the last task's message still references its change
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
        """Update the global control variate with the changes of the sites that answered."""
        share = len(directions.sites) / self._sites
        for name, mean in directions.tensors():
            change = mean.mul_(share)
            self.control[name] = self.control[name].add_(change) if name in self.control else change
