"""Choice of the linear layers and experts of a model that get adapters, as far as adapters would be trained there.

Experts of a layer are one parameter with the shape [experts, …, …], not separate layers; peft calls these
`target_parameters`. Imported only for jobs with `peft:`.
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
    """The linear layers and the experts' parameters that get adapters, by full name.

    `left_out` are the short names of linear layers that cannot have adapters; `share` is the adapted weights' fraction
    of all parameters, 0 to 1.
    """

    layers: Mapping[str, nn.Module]
    experts: Mapping[str, Tensor]
    left_out: tuple[str, ...]
    share: float

    @property
    def names(self) -> list[str]:
        """Short names: `c_attn`, `experts.down_proj`."""
        return sorted({_last(name, 1) for name in self.layers} | {_last(name, 2) for name in self.experts})


def choose_targets(lm: Any, names: list[str] | None) -> Targets:
    """The layers and experts of a Hugging Face model whose names match or end in one of `names`; None selects all.

    The output projection gets no adapter. Raises ModelError for a name without a match that can have an adapter.
    """
    head = lm.get_output_embeddings()
    linear = {
        name: layer for name, layer in lm.named_modules() if isinstance(layer, nn.Linear | Conv1D) and layer is not head
    }
    bypassed = _bypassed(lm, linear)
    refused = {end for end in {_last(name, 1) for name in linear} if end in bypassed or not _accepted(lm, end)}
    possible = {name: layer for name, layer in linear.items() if _last(name, 1) not in refused}
    experts = _experts(lm)
    every = [*possible, *experts]
    for end in names or ():
        if not any(_ends(name, end) for name in every):
            available = ", ".join(Targets(possible, experts, (), 0).names) or "none"
            why = " that can have an adapter" if any(_ends(name, end) for name in linear) else ""
            raise ModelError(
                f"training.peft.target_modules: {end}: no linear layer{why} and no experts of {type(lm).__name__}"
                f" have that name; available: {available} (the output projection gets no adapter)"
            )
    if not every:
        raise ModelError(f"training.peft: {type(lm).__name__} has no linear layers or experts that can have adapters")
    layers = {name: layer for name, layer in possible.items() if _chosen(name, names)}
    experts = {name: tensor for name, tensor in experts.items() if _chosen(name, names)}
    adapted = sum(layer.weight.numel() for layer in layers.values()) + sum(map(Tensor.numel, experts.values()))
    whole = sum(parameter.numel() for parameter in lm.parameters())
    return Targets(layers, experts, tuple(sorted(refused)) if names is None else (), adapted / whole)


def shortest(chosen: Iterable[str], every: Iterable[str], parts: int) -> list[str]:
    """Names for peft: the last `parts` of the chosen names, or full names if others in `every` have the same ending."""
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


def _bypassed(lm: Any, linear: Mapping[str, nn.Module]) -> set[str]:
    """Short names of layers with a forward pass of their own, or whose weights the model uses without calling them.

    An adapter only has an effect when its layer is called. Mamba passes some weights to a fused kernel, at least on
    some machines, so that adapters of these layers would be trained only on some machines, or nowhere.
    """
    found = {
        _last(name, 1)
        for name, layer in linear.items()
        if type(layer).forward not in (nn.Linear.forward, Conv1D.forward)
    }
    tried, context = lm, cast(AbstractContextManager[None], nullcontext())
    if lm.get_input_embeddings().weight.is_meta:
        tried, context = copy.deepcopy(lm).to(torch.bfloat16), _on_meta()
    embeddings, training = tried.get_input_embeddings(), tried.training
    layers = {name: layer for name, layer in tried.named_modules() if name in linear}
    tried.train()
    try:
        with _watched(layers) as taken, torch.no_grad(), torch.random.fork_rng(), context:
            ids = torch.arange(9, device=embeddings.weight.device)[None] % embeddings.num_embeddings
            tried(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        tried.train(training)
    return found | {_last(name, 1) for name in taken}


@contextmanager
def _on_meta() -> Iterator[None]:
    """Within the block, a bf16 model on the meta device can compute; experts' products support only bf16 there."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("meta"):
        yield


@contextmanager
def _watched(linear: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """Yield a set that collects the names of layers whose weights are read from outside of their forward pass."""
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
    """Whether peft adapts linear layers of this name, instead of refusing them or adapting something else."""
    config = LoraConfig(target_modules=[name])
    try:
        # Some are names of experts in older transformers versions: peft would adapt the experts instead of the layer.
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
