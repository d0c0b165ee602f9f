"""A site's side of what travels: the global model that it was given, and the change that it sends of it."""

from collections.abc import Callable, Mapping

import torch
from nvflare.app_common.abstract.fl_model import FLModel

from fedsft_assets.federation.protocol.messages import CONTROL, KIND_KEY, VERSION, VERSION_KEY, Kind, Wire
from fedsft_assets.federation.site.update_filters import ChangeFilter
from fedsft_assets.federation.transport import LazyTensor, rounded

Tensors = dict[str, torch.Tensor]

# A copy of the numbers of a weight, as they lie in memory, from the first to before the last, where sums are made.
Weight = Callable[[int, int], torch.Tensor]


class ExchangeError(RuntimeError):
    """What came from the server is not what this site can work with."""


class SiteExchange:
    """`given` is the global model that this site has, in float32; `control` the direction of all sites, of SCAFFOLD.

    `first` are the weights that the site begins with itself, where the server has none. Of what is received and sent
    nothing is held beside `given`: changes to it are added while they arrive (`begin`, `add`, `end`), and what is
    sent is made when its turn has come.
    """

    def __init__(self, site: str, wire: Wire, filter: ChangeFilter, first: Tensors) -> None:
        self._site, self._wire, self._filter, self.first = site, wire, filter, first
        self.given: Tensors = {}
        self.control: Tensors = {}
        self._version = 0  # rounds after which the global model was as it is here
        self._torn = False  # a change was added in part

    def take(self, received: FLModel) -> None:
        """Have the global model: as it came, or by the change to the one that is here.

        Empties what was received. Raises ExchangeError for what another version of the package sent.
        """
        version, kind = received.meta.get(VERSION_KEY), received.meta.get(KIND_KEY)
        if version != VERSION:
            raise ExchangeError(
                f"{self._site}: the server's part of the job speaks version {version!r}, this site's package"
                f" {VERSION!r}; install the version of fedsft-assets that the job was built with"
            )
        sent = dict(received.params)
        received.params.clear()
        self.control = {name.removeprefix(CONTROL): sent.pop(name) for name in list(sent) if name.startswith(CONTROL)}
        if kind != Kind.CHANGE:
            self.given, self._version, self._torn = sent, received.current_round, False
            return
        if not self.given:
            raise ExchangeError(f"{self._site}: was sent a change, but has no model to add it to")
        for name in list(sent):
            change = sent.pop(name)
            if not change.is_meta:  # else it is added already
                self.given[name].add_(change)
        self._version = received.current_round

    def begin(self, version: int) -> bool:
        if not self.given or version == self._version:  # `take` says so; the server has sent it twice
            return False
        if self._torn or version != self._version + 1:
            raise ExchangeError(
                f"{self._site}: has the model after {self._version} rounds{' in part' if self._torn else ''}, and was"
                f" sent the change that leads to round {version}"
            )
        self._torn = True
        return True

    def add(self, name: str, first: int, values: torch.Tensor) -> None:
        if name in self.given:  # else `take` says so
            self.given[name].view(-1)[first : first + len(values)].add_(values)

    def end(self, version: int) -> None:
        self._version, self._torn = version, False

    def weights(self) -> Mapping[str, torch.Tensor]:
        """What the site's model is to be before it is trained."""
        return {**self.first, **self.given}

    def changes(self, weights: Mapping[str, Weight], kind: Kind) -> Tensors:
        """What this site sends of its weights: how far they went from those that it was given, or all of them.

        `weights` give copies, which must be the same until all is sent. The given weights stay only where the next
        ones come as a change to them, else until all is sent.
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
