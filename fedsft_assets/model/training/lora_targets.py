"""What of a model gets adapters: its linear layers and its experts, so far as adapters beside them are trained.

Experts of a layer are one parameter of three dimensions, [experts, …, …], and no layers of their own; peft calls those
`target_parameters`. Imported only where a job says `peft:`.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import LoraConfig, LoraModel
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedsft_assets.model.errors import ModelError


@dataclass(frozen=True)
class Targets:
    """Weights that get adapters, by the full names of their layers, and of the experts' parameters.

    `left_out` are the short names of linear layers that cannot have adapters; `share` is the adapted weights' part of
    all parameters, 0 to 1.
    """

    layers: Mapping[str, nn.Module]
    experts: Mapping[str, Tensor]
    left_out: tuple[str, ...]
    share: float

    @property
    def names(self) -> list[str]:
        """Short names, as a person calls them: `c_attn`, `experts.down_proj`."""
        return sorted({_last(name, 1) for name in self.layers} | {_last(name, 2) for name in self.experts})


def choose_targets(lm: Any, names: list[str] | None) -> Targets:
    """What of a Hugging Face model has one of these names or ends in one; without, all that can have adapters.

    The output projection gets none. Raises ModelError for a name of nothing, or of what peft refuses.
    """
    head = lm.get_output_embeddings()
    linear = {
        name: layer for name, layer in lm.named_modules() if isinstance(layer, nn.Linear | Conv1D) and layer is not head
    }
    passed_by = _passed_by(lm, linear)
    refused = {end for end in {_last(name, 1) for name in linear} if end in passed_by or not _accepted(lm, end)}
    possible = {name: layer for name, layer in linear.items() if _last(name, 1) not in refused}
    experts = _experts(lm)
    every = [*possible, *experts]
    for end in names or ():
        if not any(_ends(name, end) for name in every):
            there = ", ".join(Targets(possible, experts, (), 0).names) or "none"
            why = " that can have an adapter" if any(_ends(name, end) for name in linear) else ""
            raise ModelError(
                f"training.peft.target_modules: {end}: no linear layer{why} and no experts of {type(lm).__name__} are"
                f" called that; there are {there} (the output projection gets no adapter)"
            )
    if not every:
        raise ModelError(f"training.peft: {type(lm).__name__} has no linear layers or experts that can have adapters")
    layers = {name: layer for name, layer in possible.items() if _chosen(name, names)}
    experts = {name: tensor for name, tensor in experts.items() if _chosen(name, names)}
    adapted = sum(layer.weight.numel() for layer in layers.values()) + sum(map(Tensor.numel, experts.values()))
    whole = sum(parameter.numel() for parameter in lm.parameters())
    return Targets(layers, experts, tuple(sorted(refused)) if names is None else (), adapted / whole)


def shortest(chosen: Iterable[str], every: Iterable[str], parts: int) -> list[str]:
    """Names for peft: the last parts of those chosen, or whole names where others of `every` end like them."""
    chosen = set(chosen)
    ends = sorted({_last(name, parts) for name in chosen})
    others = [name for name in every if name not in chosen]
    return sorted(chosen) if any(_ends(name, end) for name in others for end in ends) else ends


def _experts(lm: Any) -> dict[str, Tensor]:
    return {
        f"{path}.{name}": tensor
        for path, module in lm.named_modules()
        for name, tensor in module.named_parameters(recurse=False)
        if tensor.dim() == 3 and len(tensor) == getattr(module, "num_experts", None) and len(tensor) > 1
    }


def _passed_by(lm: Any, linear: Mapping[str, nn.Module]) -> set[str]:
    """Short names of layers that do more than a linear layer, or whose weights a model uses without calling them.

    A layer's adapter works when the layer is called. Mamba gives some weights to a kernel that does several layers'
    work, at least on some machines; an adapter beside those would be trained here and not there, or nowhere.
    """
    found = {
        _last(name, 1)
        for name, layer in linear.items()
        if type(layer).forward not in (nn.Linear.forward, Conv1D.forward)
    }
    tried, values = lm, cast(AbstractContextManager[None], nullcontext())
    if lm.get_input_embeddings().weight.is_meta:
        tried, values = copy.deepcopy(lm).to(torch.bfloat16), _no_values()
    embeddings, training = tried.get_input_embeddings(), tried.training
    layers = {name: layer for name, layer in tried.named_modules() if name in linear}
    tried.train()
    try:
        with _watched(layers) as taken, torch.no_grad(), torch.random.fork_rng(), values:
            ids = torch.arange(9, device=embeddings.weight.device)[None] % embeddings.num_embeddings
            tried(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        tried.train(training)
    return found | {_last(name, 1) for name in taken}


@contextmanager
def _no_values() -> Iterator[None]:
    """A model on the meta device computes within the block, in bf16: experts' products have no other type there."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta"):
        yield


@contextmanager
def _watched(linear: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """Yields a set that gets the names of the layers whose weights are taken from outside of them within the block."""
    taken: set[str] = set()
    inside: set[nn.Module] = set()
    names = {layer: name for name, layer in linear.items()}

    def watching(plain: Any) -> Any:
        class Watching(plain):
            def forward(self, *args: Any) -> Any:
                inside.add(self)
                try:
                    return super().forward(*args)
                finally:
                    inside.discard(self)

            def __getattr__(self, name: str) -> Any:
                if name == "weight" and self not in inside:
                    taken.add(names[self])
                return super().__getattr__(name)

        return Watching

    kinds = {layer: type(layer) for layer in names}
    watching_kinds = {kind: watching(kind) for kind in set(kinds.values())}
    try:
        for layer, kind in kinds.items():
            layer.__class__ = watching_kinds[kind]
        yield taken
    finally:
        for layer, kind in kinds.items():
            layer.__class__ = kind


def _accepted(lm: Any, name: str) -> bool:
    """Whether peft puts an adapter beside linear layers of this name, rather than refusing or taking it for another."""
    config = LoraConfig(target_modules=[name])
    try:
        # Some names are those of experts in an older transformers: peft would adapt the experts in place of the layer.
        convert_peft_config_for_transformers(config, lm, None)
        LoraModel._check_target_module_compatiblity(cast(Any, None), config, lm, name)
    except ValueError:
        return False
    return set(config.target_modules or ()) == {name}


def _chosen(name: str, names: list[str] | None) -> bool:
    return names is None or any(_ends(name, end) for end in names)


def _last(name: str, parts: int) -> str:
    return ".".join(name.split(".")[-parts:])


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")
