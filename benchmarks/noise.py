"""Measures what `filters.privacy` costs a site in a round: clipping a change and adding noise to it.

Run `python -m benchmarks.noise` from the project's root. It compares with noise of PyTorch's own generator, tensor by
tensor, which has a seed that can be tried and is no use. Both ways take the same change in turn; its tensors are those
of the published 1.3B model, of a few layers unless `--layers 24` is said, which takes 11 GB of memory. The last line is
the target, as `NAME VALUE TARGET ok|short`; a target that is short is no error.
"""

import argparse
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.data import Target
from benchmarks.transfer.model import Shape, random_tensors
from fedsft_assets.federation.site.update_filters import ChangeFilter
from fedsft_assets.specs.job import FiltersSpec, PrivacySpec

PRIVACY = PrivacySpec(clip=1.0, noise_multiplier=0.001)
_WIDTH, _POSITIONS = 2048, 2048
_PARAMETERS = Shape(layers=24, width=_WIDTH, positions=_POSITIONS).parameters

Changes = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Took:
    """Seconds of one run: of the clock, and of all cores together."""

    wall: float
    cpu: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=1, help="of 24 (default 1)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="that each way may use")
    parser.add_argument("--repeats", type=int, default=5, help="of both ways, in turn; the fastest counts (default 5)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shape = Shape(layers=args.layers, width=_WIDTH, positions=_POSITIONS)
    changes = dict(random_tensors(shape, torch.float32, seed=0))
    print(f"{shape.parameters / 1e6:.0f} million numbers in float32, {args.threads} threads", flush=True)
    ours = ChangeFilter(FiltersSpec(privacy=PRIVACY))
    ways: dict[str, Callable[[Changes], object]] = {"torch's generator": with_seed, "this project": ours.privatized}
    took: dict[str, list[Took]] = {way: [] for way in ways}
    for _ in range(args.repeats):
        for way, do in ways.items():
            took[way].append(_timed(do, changes))
    fastest = {way: min(runs, key=lambda one: one.wall) for way, runs in took.items()}
    for way, best in fastest.items():
        each = 1e9 / shape.parameters
        print(
            f"{way}: {best.wall * each:.1f} ns a number, {best.cpu * each:.1f} ns of CPU;"
            f" {best.wall * _PARAMETERS / shape.parameters:.1f} s for the 1.3B model's {_PARAMETERS / 1e9:.2f} billion"
        )
    before, now = fastest.values()
    print(Target("noise_time", now.wall / before.wall, 2.0))


def with_seed(changes: Changes) -> None:
    """The same with torch's generator, of whose seed 32 bits count."""
    random = torch.Generator().manual_seed(secrets.randbits(63))
    norm = math.sqrt(sum(change.to(torch.float64).square().sum().item() for change in changes.values()))
    for change in changes.values():
        if norm > PRIVACY.clip:
            change.mul_(PRIVACY.clip / norm)
        noise = torch.empty_like(change).normal_(generator=random)
        change.add_(noise, alpha=PRIVACY.deviation)


def _timed(do: Callable[[Changes], object], changes: Changes) -> Took:
    wall, cpu = time.perf_counter(), time.process_time()
    do(changes)
    return Took(time.perf_counter() - wall, time.process_time() - cpu)


if __name__ == "__main__":
    main()
