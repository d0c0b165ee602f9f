"""Several devices of one site, through Lightning Fabric: with a replica of the model on each (DDP), or a shard (FSDP).

Imported only if needed: Lightning takes longer to import than everything else in a trainer.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from fedsft_assets.model.language_model import LanguageModel, compute_device
from fedsft_assets.model.training.answer_loss import AnswerLoss
from fedsft_assets.model.training.batches import Batch
from fedsft_assets.model.training.devices.connections import require_own_connections
from fedsft_assets.model.training.devices.interface import MEETING_FILE, autocast, require_devices, untried
from fedsft_assets.specs.plan import ResolvedTraining


class ManyDevices:
    """The devices of all processes that torchrun started on this machine."""

    def __init__(self, model: LanguageModel, training: ResolvedTraining) -> None:
        require_devices(training.devices, int(os.environ.get("WORLD_SIZE", "1")))
        kind = compute_device().type
        self._sharded = training.strategy == "fsdp"
        strategy = (
            # Explicit, because the default is tensor parallelism within a machine, without sharding.
            ModelParallelStrategy(_shard, data_parallel_size=training.devices, tensor_parallel_size=1)
            if self._sharded
            else DDPStrategy(gradient_as_bucket_view=True)
        )
        _meet(kind)
        require_own_connections()
        precision = _precision(training, kind)
        self._scaler = precision.scaler if precision else None
        self._fabric = Fabric(accelerator=kind, devices=training.devices, strategy=strategy, plugins=precision)
        self._fabric.launch()
        self.model = model
        self.device = self._fabric.device
        self.rank, self.count = self._fabric.global_rank, self._fabric.world_size
        self._module: Any = self._fabric.setup_module(model.answer_loss)
        require_own_connections()  # again, for process groups created since

    def loss(self, batch: Batch) -> Tensor:
        loss: Tensor = self._module(batch)
        return loss

    def add_gradients(self, batch: Batch, scale: float, last: bool) -> Tensor:
        # Replicas synchronize gradients once per step, shards after every micro-batch: deferring would need the
        # whole model's gradients on each device.
        with self._fabric.no_backward_sync(self._module, enabled=not last and not self._sharded):
            loss = self.loss(batch) * scale
            self._fabric.backward(loss)
        return loss.detach()

    @property
    def scale(self) -> float:
        return float(self._scaler.get_scale()) if self._scaler else 1.0

    def prepared(self, optimizer: Optimizer) -> Any:
        return self._fabric.setup_optimizers(optimizer)

    def step(self, optimizer: Any, clip: float) -> None:
        if clip:
            self._fabric.clip_gradients(self._module, optimizer, max_norm=clip, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def total(self, value: Tensor) -> Tensor:
        result = self._fabric.all_reduce(value, reduce_op="sum")
        assert isinstance(result, Tensor)
        return result

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.model.distinct_parameters().items():
            full = tensor.detach()
            if isinstance(full, DTensor):
                full = full.full_tensor()  # every process takes part, one tensor at a time
            if self.rank == 0:
                yield name, full.to("cpu", torch.float32 if full.is_floating_point() else None, copy=True)

    @torch.no_grad()
    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        own = self.model.distinct_parameters()
        if self.rank == 0:
            self.model.require_same(weights)
        for name, tensor in own.items():
            full = (
                weights[name].to(self.device, tensor.dtype)
                if self.rank == 0
                else torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
            )
            full = full.contiguous()
            dist.broadcast(full, src=0)
            if isinstance(tensor, DTensor):  # without a source rank, each process takes its shard of its own tensor
                full = distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None)
            tensor.copy_(full)


def _meet(kind: str) -> None:
    """Join the other processes through the meeting file, if set; otherwise Lightning uses torchrun's store."""
    if (file := os.environ.get(MEETING_FILE)) and not dist.is_initialized():
        rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = dist.FileStore(file, count)
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=store, rank=rank, world_size=count)


class _Mixed(MixedPrecision):
    """Lightning's mixed precision, with the autocast of OneDevice."""

    def forward_context(self) -> torch.autocast:
        return autocast(self.device, self._desired_input_dtype)


def _precision(training: ResolvedTraining, kind: str) -> _Mixed | None:
    """The precision plugin; by name, Lightning would turn `16-mixed` into bf16 on a CPU."""
    precision = untried(training.precision)
    if precision == "32":
        return None
    scaler = torch.amp.GradScaler(kind) if precision == "16-mixed" else None
    return _Mixed(precision, kind, scaler)


def _shard(module: AnswerLoss, device_mesh: Any) -> nn.Module:
    """Shard each transformer layer as a unit, and the rest, embeddings and head, with the whole module.

    All are resharded after every forward pass: otherwise an optimizer or weights loaded after an evaluation would
    use the gathered tensors as parameters.
    """
    mesh = device_mesh["data_parallel"]
    layers = set(getattr(module.lm, "_no_split_modules", None) or ())
    for part in module.modules():
        if type(part).__name__ in layers:
            fully_shard(part, mesh=mesh)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)
    return module
