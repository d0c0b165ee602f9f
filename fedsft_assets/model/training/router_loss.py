"""The loss that keeps the experts of a mixture in even use, by the model's own forward pass.

It is trained where the model's configuration says `output_router_logits`, as transformers does when it is given labels.
"""

import inspect
from typing import Any

import torch
from torch import Tensor

from fedsft_assets.model.errors import ModelError

_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")


def router_coefficient(lm: Any) -> float:
    """What the router's loss is multiplied with beside the mean loss of targets; 0 if it is not trained.

    Raises ModelError if the configuration asks for a router's loss and does not say how much it counts.
    """
    config = lm.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return 0.0
    if "output_router_logits" not in inspect.signature(lm.forward).parameters:
        return 0.0  # no mixture: its configuration has a field that its code does not know
    for name in _COEFFICIENTS:
        for said in (getattr(lm, name, None), getattr(config, name, None)):
            if isinstance(said, int | float):
                return float(said)
    raise ModelError(
        f"{type(lm).__name__}: output_router_logits is true, but none of {', '.join(_COEFFICIENTS)} says how much the"
        " router's loss counts; set one in the model's config.json, or output_router_logits to false"
    )


def gradient_of(output: Any, factor: float) -> Tensor:
    """Zero in value; its gradient is that of `factor` times the router's loss of a model's output."""
    loss = output.aux_loss
    if not isinstance(loss, Tensor):  # a mixture without experts in any layer
        return torch.zeros(())
    return factor * (loss.float() - loss.float().detach()).to(output.logits.device)
