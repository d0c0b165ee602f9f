"""Server-side optimizer (FedOpt): the mean change is the gradient of a PyTorch optimizer (Reddi et al., 2021).

Works one tensor at a time: besides the weights, only the optimizer state is in memory.
"""

from collections.abc import Mapping
from typing import Any

import torch


class ServerOptimizer:
    """Computes the optimizer step for a mean change; `settings` are the fields of `specs.FedOpt`."""

    def __init__(self, settings: dict[str, Any], weights: Mapping[str, torch.Tensor], state: dict[str, Any]) -> None:
        """`state` is the result of `kept` after the last finished round, or empty."""
        self._steps = {
            name: torch.empty(0, dtype=tensor.dtype) for name, tensor in weights.items() if tensor.is_floating_point()
        }
        rate = settings["learning_rate"]
        parameters = [{"params": list(self._steps.values())}]
        self._optimizer: torch.optim.Optimizer
        if settings["optimizer"] == "adam":
            betas = (settings["beta1"], settings["beta2"])
            self._optimizer = torch.optim.Adam(parameters, lr=rate, betas=betas, eps=settings["epsilon"])
        else:
            self._optimizer = torch.optim.SGD(parameters, lr=rate, momentum=settings["beta1"])
        if state:
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict({"state": state, "param_groups": groups})

    def change(self, name: str, mean: torch.Tensor) -> torch.Tensor:
        """The change to apply to one tensor of the global model, given the mean change of the sites."""
        step = self._steps.get(name)
        if step is None:
            return mean
        step.data, step.grad = torch.zeros_like(mean), mean.neg()
        self._optimizer.step()
        change, step.data, step.grad = step.data, torch.empty(0, dtype=step.dtype), None
        return change

    def kept(self) -> dict[str, Any]:
        """The optimizer state that the next round needs."""
        state: dict[str, Any] = self._optimizer.state_dict()["state"]
        return state
