"""LoRA: small adapters beside a model's linear layers, which are trained while its own weights stay as they are.

Imported only where a job says `peft:`, for the peft library takes a while to load.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.language_model import LanguageModel
from fedsft_assets.model.lean import lean_imports
from fedsft_assets.model.seeds import seed_of
from fedsft_assets.specs import PeftSpec

with lean_imports():
    from peft import LoraConfig, LoraModel, TaskType
    from transformers.pytorch_utils import Conv1D

ADAPTER_FOLDER = "adapter"  # beside a checkpoint, in peft's own format

_NAME = "default"  # what peft calls the one adapter of a model
_PEFT_PREFIX = "base_model.model."  # what peft puts in front of a tensor's name in its files


@dataclass(frozen=True)
class Adapters:
    """The adapters of `model`: LanguageModel.weights and load_weights speak of them alone until they are merged."""

    model: LanguageModel
    tuner: Any  # peft's LoraModel around model.lm; no part of the model, so that names stay

    def digest(self) -> str:
        """SHA-256 of the adapters' names and values, in hex."""
        digest = hashlib.sha256()
        for name, tensor in self.model.weights().items():
            digest.update(f"{name}\0{tuple(tensor.shape)}\0".encode() + tensor.numpy().tobytes())
        return digest.hexdigest()

    def save(self, folder: Path) -> None:
        """Write adapter_config.json and adapter_model.safetensors, as peft.PeftModel.from_pretrained reads them."""
        folder.mkdir(parents=True, exist_ok=True)
        config = self.tuner.peft_config[_NAME]
        config.target_modules = sorted(config.target_modules)  # a set's order would be another one in each process
        config.save_pretrained(str(folder))
        weights = {
            f"{_PEFT_PREFIX}{name.removeprefix('lm.')}": tensor.contiguous()
            for name, tensor in self.model.weights().items()
        }
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    def merge(self) -> None:
        """Add the adapters to the weights that they stand beside; then the model is as it was without them."""
        self.tuner.merge_and_unload()
        self.model.requires_grad_(True)
        self.model.adapters_only = False
        self.model.forget_answer_loss()


def add_adapters(model: LanguageModel, peft: PeftSpec, seed: int) -> Adapters:
    """Put adapters beside the linear layers of the model, in place; from then on only they are trained and travel.

    They change no result yet: of their two factors, B is zero. A depends on `seed` and the layer's name alone, and is
    the same bit for bit on every machine. Raises ModelError if `target_modules` names no such layer.
    """
    if model.adapters_only:
        raise ModelError("the model has adapters already; merge them first")
    lm = model.lm
    layers = _target_layers(lm, peft.target_modules)
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=peft.rank,
        lora_alpha=peft.alpha,  # type: ignore[arg-type]  # peft divides it by the rank, so it need not be whole
        lora_dropout=peft.dropout,
        target_modules=_shortest(lm, layers),
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers.values()),
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
    return Adapters(model, tuner)


def _initial(shape: tuple[int, ...], seed: str) -> torch.Tensor:
    """Uniform in +-1 / sqrt(columns), as peft draws factor A, in steps that round alike everywhere."""
    generator = torch.Generator().manual_seed(seed_of(seed))
    return (torch.rand(shape, generator=generator) * 2 - 1) * (1 / math.sqrt(shape[1]))


def _target_layers(lm: Any, names: list[str] | None) -> dict[str, nn.Module]:
    """The linear layers, but for the output projection, that have one of these names or end in one; without, all."""
    head = lm.get_output_embeddings()
    linear = {
        name: layer for name, layer in lm.named_modules() if isinstance(layer, nn.Linear | Conv1D) and layer is not head
    }
    chosen = {name: layer for name, layer in linear.items() if names is None or any(_ends(name, end) for end in names)}
    unknown = [end for end in names or () if not any(_ends(name, end) for name in linear)]
    if unknown or not chosen:
        there = ", ".join(sorted({name.rpartition(".")[2] for name in linear})) or "none"
        raise ModelError(
            f"training.peft.target_modules: {', '.join(unknown) or 'all'}: no linear layer of {type(lm).__name__} is"
            f" called that; there are {there} (the output projection gets no adapter)"
        )
    return chosen


def _shortest(lm: Any, layers: dict[str, nn.Module]) -> list[str]:
    """Names for peft: the last parts of the layers' names, or whole names where others end like them."""
    ends = sorted({name.rpartition(".")[2] for name in layers})
    others = (name for name, _ in lm.named_modules() if name not in layers)
    return sorted(layers) if any(_ends(name, end) for name in others for end in ends) else ends


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
