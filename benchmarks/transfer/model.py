"""The models that `benchmarks.transfer` sends: tensors of GPT-2's names and shapes with random values, no network."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_GENERATED = 1 << 20  # random numbers that all tensors are cut from: making billions of them takes minutes


@dataclass(frozen=True)
class Shape:
    """A GPT-2: its tensors are those of the Hugging Face model, the tied output projection once."""

    layers: int
    width: int
    vocabulary: int = 50257
    positions: int = 1024

    def tensors(self) -> dict[str, tuple[int, ...]]:
        width = self.width
        shapes: dict[str, tuple[int, ...]] = {
            "wte.weight": (self.vocabulary, width),
            "wpe.weight": (self.positions, width),
        }
        for layer in range(self.layers):
            for name, shape in {
                "ln_1": (width,),
                "attn.c_attn": (width, 3 * width),
                "attn.c_proj": (width, width),
                "ln_2": (width,),
                "mlp.c_fc": (width, 4 * width),
                "mlp.c_proj": (4 * width, width),
            }.items():
                shapes[f"h.{layer}.{name}.weight"] = shape
                shapes[f"h.{layer}.{name}.bias"] = shape[-1:]
        shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
        return shapes

    @property
    def parameters(self) -> int:
        return sum(prod(shape) for shape in self.tensors().values())


def random_tensors(shape: Shape, dtype: torch.dtype, seed: int) -> Iterator[tuple[str, Tensor]]:
    """One tensor after the other; what is larger than a piece repeats it."""
    generator = torch.Generator().manual_seed(seed)
    piece = (torch.randn(_GENERATED, generator=generator) * 0.02).to(dtype)
    for name, dimensions in shape.tensors().items():
        count = prod(dimensions)
        yield name, piece.repeat(-(-count // _GENERATED))[:count].reshape(dimensions)


def write_archive(shape: Shape, into: Path) -> None:
    """A `.nemo` archive of float32 weights, as far as the server reads one."""
    from fedsft_assets.model.archive.nemo_archive import WEIGHTS
    from fedsft_assets.model.archive.tar_writer import new_tar, tar_member
    from fedsft_assets.model.archive.torch_reader import TensorInfo
    from fedsft_assets.model.archive.torch_writer import write_tensors

    infos = {name: TensorInfo(torch.float32, dimensions) for name, dimensions in shape.tensors().items()}
    tensors = random_tensors(shape, torch.float32, seed=0)
    with new_tar(into) as file, tar_member(file, f"./{WEIGHTS}"):
        write_tensors(file, infos, lambda _name: next(tensors)[1])


class Weights(nn.Module):
    """The tensors as a module, as NVFlare's recipe wants its model."""

    def __init__(self, layers: int, width: int, vocabulary: int, positions: int, dtype: str) -> None:
        super().__init__()
        shape = Shape(layers, width, vocabulary, positions)
        for name, tensor in random_tensors(shape, getattr(torch, dtype), seed=0):
            self.register_parameter(name.replace(".", "/"), nn.Parameter(tensor, requires_grad=False))

    def forward(self, *_: Any) -> Any:
        raise NotImplementedError("these weights are only sent")
