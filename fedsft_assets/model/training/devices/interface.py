"""The interface of a site's devices, and its implementation for one device in plain PyTorch.

The training loop is the same for one device and several. Of several, each is a process started by torchrun, and all
processes make the same calls.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.language_model import LanguageModel, compute_device
from fedsft_assets.model.training.batches import Batch
from fedsft_assets.specs.job import Precision

# The environment variable of a file through which the processes of one machine find each other. Without it they use
# torchrun's TCP store, which listens on every network interface.
MEETING_FILE = "FEDSFT_MEETING_FILE"

_DTYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class Devices(Protocol):
    """A model on the devices of one site: `count` processes, of which `rank` 0 sends and receives weights."""

    model: LanguageModel
    device: torch.device
    rank: int
    count: int

    def loss(self, batch: Batch) -> Tensor:
        """The summed loss of this process's batch."""

    def add_gradients(self, batch: Batch, scale: float, last: bool) -> Tensor:
        """Add the gradients of `scale` times the summed loss, and return that product, a detached scalar.

        After the `last` micro-batch of a step, the gradients are the mean over all processes.
        """

    @property
    def scale(self) -> float:
        """The factor of gradients until `step`, for loss scaling in fp16."""

    def prepared(self, optimizer: Optimizer) -> Any:
        """The optimizer in the form that `step` takes."""

    def step(self, optimizer: Any, clip: float) -> None:
        """Clip the gradients to the norm `clip` (0: no clipping), step, and clear them."""

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield LanguageModel.weights at rank 0, nothing at others. All processes must exhaust the iterator."""

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Load weights as LanguageModel.load_weights does; those passed at rank 0 are used."""


def precisions() -> list[Precision]:
    """The candidates for `auto` on this machine; the first is the default without a trial.

    A GPU with bf16 support uses it: its matrix units are several times as fast as in fp32, attention in one kernel
    requires 16 bits, and a pass in fp32 may not fit into memory. On a CPU with bf16 instructions, only a trial can
    tell; without them, bf16 is emulated, orders of magnitude slower than fp32.
    """
    if torch.cuda.is_available():
        return ["bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32"]
    capabilities = torch.cpu.get_capabilities()
    native = any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return ["32", "bf16-mixed"] if native else ["32"]


def untried(precision: Precision) -> Precision:
    """The precision, or for `auto` the default without a trial: the same on all CPUs, so that scores are comparable."""
    return precisions()[0] if precision == "auto" else precision


class OneDevice:
    """The first GPU, or the CPU."""

    rank, count = 0, 1

    def __init__(self, model: LanguageModel, precision: Precision = "auto") -> None:
        self.model = model
        self.device = compute_device()
        model.to(self.device)
        self._module: nn.Module = model.answer_loss
        self._dtype = _DTYPES.get(untried(precision))
        self._scaler = torch.amp.GradScaler(self.device.type) if self._dtype == torch.float16 else None

    def loss(self, batch: Batch) -> Tensor:
        with self._autocast():
            return self._module(batch)

    def losses(self, batch: Batch) -> Tensor:
        """The loss of each of the batch's targets, fp32 [N], without gradients."""
        with self._autocast():
            return self.model.answer_loss.of_each(batch)

    def add_gradients(self, batch: Batch, scale: float, last: bool) -> Tensor:  # noqa: ARG002 no other processes
        loss = self.loss(batch) * scale
        (self._scaler.scale(loss) if self._scaler else loss).backward()
        return loss.detach()

    @property
    def scale(self) -> float:
        return self._scaler.get_scale() if self._scaler else 1.0

    def prepared(self, optimizer: Optimizer) -> Optimizer:
        return optimizer

    def step(self, optimizer: Optimizer, clip: float) -> None:
        if self._scaler:
            self._scaler.unscale_(optimizer)
        if clip:
            nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
        if self._scaler:
            self._scaler.step(optimizer)
            self._scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def total(self, value: Tensor) -> Tensor:
        return value

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        return self.model.each_weight()

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        self.model.load_weights(weights)

    def _autocast(self) -> AbstractContextManager[None]:
        return autocast(self.device.type, self._dtype) if self._dtype else nullcontext()


def autocast(kind: str, dtype: torch.dtype) -> torch.autocast:
    """Autocast to 16 bits, without PyTorch's cache of cast weights.

    A pass uses each weight once, and the cache would hold a whole 16-bit model on each device, even with sharding.
    """
    return torch.autocast(kind, dtype, cache_enabled=False)


def require_devices(planned: int, started: int) -> None:
    """Raise ModelError if the number of processes differs from the plan's number of devices."""
    if planned != started:
        raise ModelError(
            f"devices: {planned}, but {started} processes run; start the trainer with torchrun --nproc-per-node"
            f" {planned}"
        )
