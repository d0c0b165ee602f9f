"""LoRA: trains small adapters of a model's linear layers and experts, with the model's own weights frozen.

Imported only for jobs with `peft:`, because the peft library is slow to import.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, LoraModel, TaskType
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.training.lora_targets import Targets, choose_targets, shortest
from fedsft_assets.model.training.seeds import seed_of
from fedsft_assets.specs.job import PeftSpec

ADAPTER_FOLDER = "adapter"  # beside a checkpoint, in peft's own format

_NAME = "default"  # peft's name for a model's only adapter
_PEFT_PREFIX = "base_model.model."  # peft's prefix of tensor names in its files


@dataclass(frozen=True)
class Adapters:
    """The adapters of `model`: LanguageModel.weights and load_weights cover only these until they are merged."""

    model: LanguageModel
    tuner: Any  # peft's LoraModel around model.lm; not part of the model, so that names stay unchanged
    targets: Targets

    def description(self) -> str:
        """A log line: what is trained, which layers have adapters, and which cannot have one."""
        trained = sum(tensor.numel() for tensor in self.model.distinct_parameters().values())
        whole = sum(parameter.numel() for parameter in self.model.parameters())
        left_out = self.targets.left_out
        return (
            f"adapters of rank {self.tuner.peft_config[_NAME].r} · {trained:,} of {whole:,} parameters"
            f" ({trained / whole:.1%}) trained · adapters for {', '.join(self.targets.names)}"
            f" ({self.targets.share:.1%} of the model)"
            + (f" · {', '.join(left_out)} cannot have adapters" if left_out else "")
        )

    def digest(self) -> str:
        """SHA-256 of the adapters' names and values, in hex."""
        digest = hashlib.sha256()
        for name, tensor in self.model.weights().items():
            digest.update(f"{name}\0{tuple(tensor.shape)}\0".encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors for peft.PeftModel.from_pretrained."""
        folder.mkdir(parents=True, exist_ok=True)
        config = self.tuner.peft_config[_NAME]
        # The order of a set differs between processes.
        config.target_modules = sorted(config.target_modules)
        config.target_parameters = sorted(config.target_parameters or ()) or None
        config.save_pretrained(str(folder))
        weights = {
            f"{_PEFT_PREFIX}{name.removeprefix('lm.')}": tensor.contiguous()
            for name, tensor in self.model.weights().items()
        }
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    def merge(self) -> None:
        """Add the adapters to the weights of their layers, and restore the model's structure without adapters."""
        self.tuner.merge_and_unload()
        self.model.requires_grad_(True)
        self.model.adapters_only = False
        self.model.forget_answer_loss()


def add_adapters(model: LanguageModel, peft: PeftSpec, seed: int) -> Adapters:
    """Add adapters to linear layers and experts of the model, in place; only they are then trained and sent.

    They do not change results yet: of their two factors, B is zero. A depends only on `seed` and the layer's name, bit
    for bit on every machine. Raises ModelError if `target_modules` names nothing that can have an adapter.
    """
    if model.adapters_only:
        raise ModelError("the model has adapters already; merge them first")
    lm = model.lm
    targets = choose_targets(lm, peft.target_modules)
    if targets.experts and peft.dropout:
        raise ModelError(
            f"training.peft.dropout: {peft.dropout}: peft has no dropout for experts, which {type(lm).__name__} has;"
            " set 0, or other target_modules"
        )
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=peft.rank,
        lora_alpha=peft.alpha,  # type: ignore[arg-type]  # peft divides it by the rank, so it need not be whole
        lora_dropout=peft.dropout,
        target_modules=shortest(targets.layers, (name for name, _ in lm.named_modules()), parts=1),
        target_parameters=shortest(targets.experts, (name for name, _ in lm.named_parameters()), parts=2) or None,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in targets.layers.values()),
        inference_mode=False,
    )
    with torch.random.fork_rng():
        tuner = LoraModel(lm, config, _NAME)
    model.train(model.training)
    model.adapters_only = True
    model.forget_answer_loss()
    with torch.no_grad():
        for name, tensor in model.distinct_parameters().items():
            if ".lora_A." in name:
                tensor.copy_(_initial(tuple(tensor.shape), f"{seed}/{name}"))
    return Adapters(model, tuner, targets)


def _initial(shape: tuple[int, ...], seed: str) -> torch.Tensor:
    """Uniform in +-1 / sqrt(columns), like peft's factor A, in operations that round the same on every machine."""
    generator = torch.Generator().manual_seed(seed_of(seed))
    return (torch.rand(shape, generator=generator) * 2 - 1) * (1 / math.sqrt(shape[1]))
