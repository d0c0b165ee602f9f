"""A site's update in a round, validated on arrival: the model's tensors, in the wire precision."""

from collections.abc import Hashable, Mapping
from typing import Any

import torch

from fedsft_assets.federation.protocol.messages import CONTROL, Kind, Wire
from fedsft_assets.federation.protocol.site_messages import UpdateMessage
from fedsft_assets.federation.server.aggregation import norm_of, other_tensors, plain, shapes_of
from fedsft_assets.federation.transport import BrokenTensor, StoredTensor

Tensors = dict[str, Any]  # torch tensors, or references to tensors on disk


class SiteUpdate:
    """`message` is the metadata sent with the tensors; `norm` is their joint L2 norm."""

    def __init__(
        self,
        message: UpdateMessage,
        params: object,
        of_model: Mapping[str, tuple[int, ...]] | None,
        wire: Wire,
        sends_directions: bool,
    ) -> None:
        """`of_model` are the shapes of the global model; None if the sites create the first one.

        Raises ValueError describing the first mismatch.
        """
        self.message = message
        sent = _checked(params, message.kind, wire)
        self.directions = {name: sent.pop(name) for name in list(sent) if name.startswith(CONTROL)}
        self._tensors = sent
        self._shapes = shapes_of(sent)
        wrong = other_tensors(self._shapes, of_model, whole=message.kind == Kind.FULL) if of_model is not None else None
        allowed = {f"{CONTROL}{name}": shape for name, shape in (of_model or self._shapes).items()}
        of_directions = shapes_of(self.directions)
        wrong = wrong or other_tensors(of_directions, allowed if sends_directions else {}, whole=False)
        if wrong:
            raise ValueError(wrong)
        self.norm = norm_of(sent)
        self.norm_of_directions = norm_of(self.directions)

    @property
    def start(self) -> Hashable:
        """What must be equal at all sites that initialize their own model."""
        return self.message.first, tuple(sorted(self._shapes.items()))

    def take_tensors(self) -> Tensors:
        """Hand over the model's tensors; this object keeps no reference."""
        taken, self._tensors = self._tensors, {}
        return taken

    def take_directions(self) -> Tensors:
        """Hand over the control variate's tensors, whose names have the prefix `CONTROL`."""
        taken, self.directions = self.directions, {}
        return taken


def _checked(params: object, kind: str, wire: Wire) -> Tensors:
    if not isinstance(params, dict) or not all(isinstance(name, str) for name in params):
        raise ValueError(f"params: found {type(params).__name__}, expected a dict of tensors by name")
    for name, tensor in params.items():
        changes = kind == Kind.CHANGE or name.startswith(CONTROL)
        floating = torch.bfloat16 if changes and wire == Wire.BF16_DIFF else torch.float32
        if isinstance(tensor, BrokenTensor):
            raise ValueError(f"{plain(name)}: {tensor.reason}")
        if not isinstance(tensor, torch.Tensor | StoredTensor):
            raise ValueError(f"{plain(name)}: found {type(tensor).__name__}, expected a tensor")
        if isinstance(tensor, torch.Tensor) and (tensor.layout != torch.strided or tensor.is_meta):
            raise ValueError(f"{plain(name)}: found a tensor without data, expected a dense one")
        if tensor.dtype.is_complex or (tensor.dtype.is_floating_point and tensor.dtype != floating):
            raise ValueError(f"{plain(name)}: found {tensor.dtype}, expected {floating}")
    return dict(params)
