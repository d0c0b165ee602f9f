"""Corrections of a site's steps, so that models of sites with different data do not drift apart."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from fedsft_assets.model.language_model import LanguageModel


class Correction(Protocol):
    """The correction for one round at one site."""

    def begin(self, model: LanguageModel) -> None:
        """Called with the model before the first step."""

    def before_step(self, scale: float) -> None:
        """Called before a step, and may change the gradients, which are multiplied by `scale`."""

    def after_step(self, learning_rate: float) -> None:
        """Called after a step, and may change the weights."""


class Proximal:
    """FedProx: adds the gradient of mu / 2 times the squared distance from the round's initial weights.

    Li et al., Federated Optimization in Heterogeneous Networks, 2020. Each process keeps a copy of its shard.
    """

    def __init__(self, mu: float) -> None:
        self._mu = mu
        self._starts: list[tuple[Tensor, Tensor]] = []

    def begin(self, model: LanguageModel) -> None:
        self._starts = [(p, p.detach().clone()) for p in model.parameters() if p.requires_grad]

    @torch.no_grad()
    def before_step(self, scale: float) -> None:
        for parameter, start in self._starts:
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=self._mu * scale)

    def after_step(self, learning_rate: float) -> None:
        pass


class ControlVariates:
    """SCAFFOLD: corrects each step by the difference between the control variates of all sites and of this one.

    Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging for Federated Learning, 2020, option II. A control
    variate is a change of weights per learning rate, so it works with any optimizer. Tensors are named as in
    `LanguageModel.weights`. Supports one device.
    """

    def __init__(self, everywhere: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> None:
        """The control variates of all sites together and of this one, by name; missing tensors are zero."""
        self._everywhere, self._here = everywhere, here
        self._corrected: list[tuple[Tensor, Tensor]] = []
        self._starts: dict[str, Tensor] = {}
        self._travelled = 0.0
        self._model: LanguageModel | None = None

    def begin(self, model: LanguageModel) -> None:
        self._model = model
        self._starts = model.weights()
        for name, tensor in model.distinct_parameters().items():
            if name in self._everywhere:
                drift = self._everywhere[name] - self._here[name] if name in self._here else self._everywhere[name]
                self._corrected.append((tensor, drift.to(tensor.device)))

    def before_step(self, scale: float) -> None:
        pass

    @torch.no_grad()
    def after_step(self, learning_rate: float) -> None:
        self._travelled += learning_rate
        for tensor, drift in self._corrected:
            tensor.add_(drift, alpha=-learning_rate)

    def changes(self) -> dict[str, Tensor]:
        """The changes of this site's control variates, after the round."""
        assert self._model is not None, "begin() comes first"
        changes = {}
        for name, tensor in self._model.each_weight():
            change = self._starts.pop(name).sub_(tensor).div_(self._travelled)
            changes[name] = change.sub_(self._everywhere[name]) if name in self._everywhere else change
        return changes
