"""Conversion of an archive's tensors to the layout of published checkpoints, by transformers' own conversion.

Archives use the names of transformers 5: one tensor for all experts of a layer, `lm_head` for every output projection.
Exported folders use the names that each architecture was published with, which all versions read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsft_assets.model.archive.torch_reader import TensorFile, TensorInfo
from fedsft_assets.model.language_model import empty_lm
from fedsft_assets.model.trainable import require_same_shapes

_PREFIX = "lm."


@dataclass(frozen=True)
class _Part:
    """Tensors that are converted together: their names in the archive, and the resulting tensors by name."""

    sources: tuple[str, ...]
    targets: Mapping[str, TensorInfo]


class PublishedWeights:
    """The tensors of an archive in published form; `infos` describes them by name, in the order of `each`."""

    def __init__(self, hf: Mapping[str, Any], tensors: TensorFile, where: str) -> None:
        """Plan the conversion for the model of a Hugging Face configuration, without reading tensors.

        Raises ModelError that begins with `where` if these are not the tensors of that model.
        """
        with torch.device("meta"):
            self._lm = empty_lm(hf)
        self._tensors = tensors
        self._parts = self._plan(_own_tensors(self._lm, tensors, where))
        self.infos = {name: info for part in self._parts for name, info in part.targets.items()}

    def each(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors, with only those in memory that are converted together, usually one."""
        for part in self._parts:
            fresh = self._converted({name: self._tensors.read(_PREFIX + name) for name in part.sources})
            for name in part.targets:
                yield name, fresh.pop(name)

    def _plan(self, infos: Mapping[str, TensorInfo]) -> list[_Part]:
        """The smallest parts that can be converted independently, found by trial on meta tensors."""
        empty = {name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in infos.items()}
        whole = _infos(self._converted(dict(empty)))
        together: dict[str, list[str]] = {}  # sources by target
        for name, tensor in empty.items():
            sources = [name]
            for target in self._alone(name, tensor) or whole:
                if (others := together.get(target, sources)) is not sources:
                    others += sources
                    together |= {key: others for key, found in together.items() if found is sources}
                    sources = others
                together[target] = sources
        groups = list({id(sources): sources for sources in together.values()}.values())
        parts = [self._part({name: empty[name] for name in sources}) for sources in groups]
        if {name: info for part in parts for name, info in part.targets.items()} != whole:
            return [self._part(empty)]  # results depend on tensors of other parts
        return parts

    def _alone(self, name: str, tensor: Tensor) -> list[str]:
        """The targets of one tensor; empty if it cannot be converted without others."""
        try:
            return list(self._converted({name: tensor}))
        except Exception:  # each architecture's operations raise errors of their own
            return []

    def _part(self, tensors: Mapping[str, Tensor]) -> _Part:
        return _Part(tuple(tensors), _infos(self._converted(dict(tensors))))

    def _converted(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(self._lm, tensors).items()}


def _own_tensors(lm: Any, tensors: TensorFile, where: str) -> dict[str, TensorInfo]:
    """The tensors to write, by their names in the model; tied ones once, since loading ties them again."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    require_same_shapes(
        {f"{_PREFIX}{name}": tuple(tensor.shape) for name, tensor in lm.state_dict().items()},
        {name: info.shape for name, info in tensors.tensors.items()},
        f"{where}: not the tensors of {type(lm).__name__}",
    )
    kept = remove_tied_weights_from_state_dict(lm.state_dict(), lm)
    return {name: tensors.tensors[f"{_PREFIX}{name}"] for name in kept}


def _infos(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
