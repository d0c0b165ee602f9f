"""AdamW and the learning rate of a whole job, from any of its steps on."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nemo.core.optim.lr_scheduler import CosineAnnealing
from torch.nn import Parameter
from torch.optim import AdamW

_FINAL_LEARNING_RATE = 0.1  # of the highest one


@dataclass(frozen=True)
class OptimizerPlan:
    """An optimizer that does the steps of a job from `first_step` (0-based) on.

    `warmup_ratio` is a share of `total_steps`, the steps of all rounds. `fused` updates all
    parameters in one kernel, which clipping under a gradient scaler (precision 16-mixed) rules out.
    """

    learning_rate: float
    total_steps: int
    first_step: int = 0
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    fused: bool = True


# The moments of AdamW by position of the parameter, as in `state_dict()["state"]`.
Moments = dict[int, dict[str, Any]]


def build_optimizer(
    parameters: Iterable[Parameter], plan: OptimizerPlan, moments: Moments | None = None
) -> tuple[AdamW, CosineAnnealing]:
    """AdamW, without decay on biases and norms, and NeMo's cosine schedule standing at the plan's first step.

    In a warm-up of w = int(warmup_ratio * total_steps) steps, step s has (s + 1) / (w + 1) of the
    learning rate; then a cosine falls to a tenth of it at `total_steps`. NeMo's `setup_optimization`
    cannot start in the middle of a schedule: it takes the trainer's `max_steps`, which are one
    round's, for the whole, and sets no `initial_lr`. So its scheduler is built here. `moments` are those
    of an earlier optimizer of the same parameters, to go on with.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": plan.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    for group in groups:
        group["initial_lr"] = plan.learning_rate
    optimizer = AdamW(groups, lr=plan.learning_rate, fused=plan.fused)
    if moments:
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    scheduler = CosineAnnealing(
        optimizer,
        warmup_ratio=plan.warmup_ratio,
        max_steps=plan.total_steps,
        min_lr=_FINAL_LEARNING_RATE * plan.learning_rate,
        last_epoch=plan.first_step - 1,
    )
    return optimizer, scheduler
