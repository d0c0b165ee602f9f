"""An archive's tensors as published checkpoints of their model have them, by transformers' own conversion.

An archive has the names that transformers 5 gives: one tensor for all experts of a layer, `lm_head` for every output
projection. Folders for exchange have those that each architecture was published with, which all versions read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedsft_assets.model.archive.torch_reader import TensorFile, TensorInfo
from fedsft_assets.model.errors import ModelError
from fedsft_assets.model.language_model import empty_lm

_PREFIX = "lm."


@dataclass(frozen=True)
class _Part:
    """Tensors that are converted together: names in the archive, and what becomes of them."""

    sources: tuple[str, ...]
    targets: Mapping[str, TensorInfo]


class PublishedWeights:
    """The tensors of an archive as its model publishes them; `infos` in the order that `each` gives them in."""

    def __init__(self, hf: Mapping[str, Any], tensors: TensorFile, where: str) -> None:
        """Plan the conversion for the model of a Hugging Face configuration; nothing is read yet.

        Raises ModelError that begins with `where` if these are not the tensors of that model.
        """
        with torch.device("meta"):
            self._lm = empty_lm(hf)
        self._tensors = tensors
        self._parts = self._plan(_own_tensors(self._lm, tensors, where))
        self.infos = {name: info for part in self._parts for name, info in part.targets.items()}

    def each(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, one after the other; in memory are those that are converted together, mostly one."""
        for part in self._parts:
            fresh = self._converted({name: self._tensors.read(_PREFIX + name) for name in part.sources})
            for name in part.targets:
                yield name, fresh.pop(name)

    def _plan(self, infos: Mapping[str, TensorInfo]) -> list[_Part]:
        """The smallest parts that can be converted each by itself, tried out on tensors without values."""
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
            return [self._part(empty)]  # what becomes of one depends on another
        return parts

    def _alone(self, name: str, tensor: Tensor) -> list[str]:
        """The targets of one tensor; none if it cannot be converted without others."""
        try:
            return list(self._converted({name: tensor}))
        except Exception:  # of any kind: each architecture has its own operations
            return []

    def _part(self, tensors: Mapping[str, Tensor]) -> _Part:
        return _Part(tuple(tensors), _infos(self._converted(dict(tensors))))

    def _converted(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(self._lm, tensors).items()}


def _own_tensors(lm: Any, tensors: TensorFile, where: str) -> dict[str, TensorInfo]:
    """The tensors to write, by their names in the model: tied ones once, since loading ties them again."""
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    expected = {name: tuple(tensor.shape) for name, tensor in lm.state_dict().items()}
    found = {name.removeprefix(_PREFIX): info for name, info in tensors.tensors.items() if name.startswith(_PREFIX)}
    problems = [f"missing {_PREFIX}{name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in tensors.tensors if name.removeprefix(_PREFIX) not in expected]
    problems += [
        f"{_PREFIX}{name} has shape {found[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ModelError(f"{where}: not the tensors of {type(lm).__name__}: {'; '.join(problems[:5])}{more}")
    return {name: found[name] for name in remove_tied_weights_from_state_dict(lm.state_dict(), lm)}


def _infos(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
