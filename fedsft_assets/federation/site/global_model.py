"""The site's side of the model exchange: the global model it received, and the change it sends back."""

from collections.abc import Callable, Mapping

import torch
from nvflare.app_common.abstract.fl_model import FLModel

from fedsft_assets.federation.protocol.messages import CONTROL, KIND_KEY, VERSION, VERSION_KEY, Kind, Wire
from fedsft_assets.federation.site.update_filters import ChangeFilter
from fedsft_assets.federation.transport import LazyTensor, rounded

Tensors = dict[str, torch.Tensor]

# Copies the flattened elements [first, last) of a weight, in the precision of the sums.
Weight = Callable[[int, int], torch.Tensor]


class ExchangeError(RuntimeError):
    """The server sent something that this site cannot use."""


class SiteExchange:
    """`given` is the global model at this site, in float32; `control` is SCAFFOLD's global control variate.

    `first` are the site's own initial weights, if the server has none. Only `given` is held in memory: incoming changes
    are added to it while they arrive (`begin`, `add`, `end`), and outgoing tensors are computed when they are sent.
    """

    def __init__(self, site: str, wire: Wire, filter: ChangeFilter, first: Tensors) -> None:
        self._site, self._wire, self._filter, self.first = site, wire, filter, first
        self.given: Tensors = {}
        self.control: Tensors = {}
        self._version = 0  # number of rounds behind `given`
        self._torn = False  # a change was only partly added

    def take(self, received: FLModel) -> None:
        """Update the global model: replace it, or apply the received change to it.

        Empties `received.params`. Raises ExchangeError if another version of the package sent it.
        """
        version, kind = received.meta.get(VERSION_KEY), received.meta.get(KIND_KEY)
        if version != VERSION:
            raise ExchangeError(
                f"{self._site}: the server uses protocol version {version!r}, this site's package uses"
                f" {VERSION!r}; install the version of fedsft-assets that the job was built with"
            )
        sent = dict(received.params)
        received.params.clear()
        self.control = {name.removeprefix(CONTROL): sent.pop(name) for name in list(sent) if name.startswith(CONTROL)}
        if kind != Kind.CHANGE:
            self.given, self._version, self._torn = sent, received.current_round, False
            return
        if not self.given:
            raise ExchangeError(f"{self._site}: received a change, but has no model to apply it to")
        for name in list(sent):
            change = sent.pop(name)
            if not change.is_meta:  # meta: already added on arrival
                self.given[name].add_(change)
        self._version = received.current_round

    def begin(self, version: int) -> bool:
        if not self.given or version == self._version:  # no model: `take` raises; same version: sent twice
            return False
        if self._torn or version != self._version + 1:
            raise ExchangeError(
                f"{self._site}: has the model after {self._version} rounds{' in part' if self._torn else ''}, but"
                f" received the change for round {version}"
            )
        self._torn = True
        return True

    def add(self, name: str, first: int, values: torch.Tensor) -> None:
        if name in self.given:  # otherwise `take` raises
            self.given[name].view(-1)[first : first + len(values)].add_(values)

    def end(self, version: int) -> None:
        self._version, self._torn = version, False

    def weights(self) -> Mapping[str, torch.Tensor]:
        """The weights to load before training."""
        return {**self.first, **self.given}

    def changes(self, weights: Mapping[str, Weight], kind: Kind) -> Tensors:
        """The tensors to send: differences from the received weights, or the full weights.

        The copies that `weights` return must not change until all tensors are sent. The received weights are kept only
        if the next ones arrive as a change; otherwise only until all is sent.
        """
        given = {**self.first, **self.given}
        if self._wire == Wire.FP32:
            self.given = {}
        kept = [name for name in weights if self._filter.keeps(name)]
        if kind == Kind.CHANGE and not self._filter.needs_all:
            return {name: self._lazy_change(given[name], weights[name]) for name in kept}
        whole = {name: weights[name](0, given[name].numel()).reshape(given[name].shape) for name in kept}
        changes = self._filter.privatized({name: weight.sub_(given[name]) for name, weight in whole.items()})
        if kind == Kind.FULL:
            return {name: change.add_(self.first[name]) for name, change in changes.items()}
        return {name: rounded(change, self._wire) for name, change in changes.items()}

    def _lazy_change(self, given: torch.Tensor, weight: Weight) -> torch.Tensor:
        flat, wire = given.reshape(-1), self._wire

        def make(first: int, last: int) -> torch.Tensor:
            return rounded(weight(first, last).sub_(flat[first:last]), wire)

        return LazyTensor(tuple(given.shape), make(0, 0).dtype, make)
