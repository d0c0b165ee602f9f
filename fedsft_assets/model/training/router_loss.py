"""The load balancing loss of a mixture of experts, from the model's own forward pass.

It is trained if the model's configuration sets `output_router_logits`, as transformers does when called with labels.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from fedsft_assets.model.errors import ModelError

_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def router_coefficient(lm: Any) -> float:
    """The coefficient of the router loss relative to the mean loss of targets; 0 if it is not trained.

    Raises ModelError if the configuration enables the router loss without a coefficient.
    """
    config = lm.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return 0.0
    if "output_router_logits" not in inspect.signature(lm.forward).parameters:
        return 0.0  # not a mixture: its code does not use this field of the configuration
    for name in _COEFFICIENTS:
        for value in (getattr(lm, name, None), getattr(config, name, None)):
            if isinstance(value, int | float):
                return float(value)
    raise ModelError(
        f"{type(lm).__name__}: output_router_logits is true, but the router loss has no coefficient"
        f" ({' or '.join(_COEFFICIENTS)}); set one in the model's config.json, or set output_router_logits to false"
    )


def gradient_of(output: Any, factor: float) -> Tensor:
    """A scalar zero with the gradient of `factor` times the router loss in a model's output."""
    loss = output.aux_loss
    if not isinstance(loss, Tensor):  # no layer has experts
        return torch.zeros(())
    return factor * (loss.float() - loss.float().detach()).to(output.logits.device)
