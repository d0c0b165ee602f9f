"""What an algorithm does to the steps of a site, so that sites with different data do not drift apart."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from fedsft_assets.model.language_model import LanguageModel


class Correction(Protocol):
    """One round at one site."""

    def begin(self, model: LanguageModel) -> None:
        """The model has the weights that the round starts from."""

    def before_step(self, scale: float) -> None:
        """Gradients are there, `scale` times too large; they may be changed."""

    def after_step(self, learning_rate: float) -> None:
        """A step was made; weights may be changed."""


class Proximal:
    """FedProx: the gradient of mu / 2 times the squared distance from the weights that the round started from.

    Li et al., Federated Optimization in Heterogeneous Networks, 2020. Each process keeps a copy of its share.
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
    """SCAFFOLD: each step is corrected by how far the site's usual direction is from that of all sites.

    Karimireddy et al., SCAFFOLD: Stochastic Controlled Averaging for Federated Learning, 2020, its option II. A
    direction is a change of weights per learning rate, so it fits any optimizer. Tensors are by name, as
    `LanguageModel.weights` has them; one device.
    """

    def __init__(self, everywhere: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> None:
        """The directions of all sites together and of this one; those that are missing are zero."""
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
                away = self._everywhere[name] - self._here[name] if name in self._here else self._everywhere[name]
                self._corrected.append((tensor, away.to(tensor.device)))

    def before_step(self, scale: float) -> None:
        pass

    @torch.no_grad()
    def after_step(self, learning_rate: float) -> None:
        self._travelled += learning_rate
        for tensor, away in self._corrected:
            tensor.add_(away, alpha=-learning_rate)

    def changes(self) -> dict[str, Tensor]:
        """After the round: what to add to this site's directions."""
        assert self._model is not None, "begin() comes first"
        changes = {}
        for name, tensor in self._model.each_weight():
            change = self._starts.pop(name).sub_(tensor).div_(self._travelled)
            changes[name] = change.sub_(self._everywhere[name]) if name in self._everywhere else change
        return changes
