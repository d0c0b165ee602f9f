"""The overhead benchmark's work without any federation: one process does it all, one site after the other."""

import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.overhead.input import Input
from benchmarks.overhead.torch_loop import Loop


def run(given: Input, into: Path) -> None:
    """Write the final model to `into`. The mean of three small models costs next to nothing, and makes losses equal."""
    sites = [given.site(name) for name in given.sites]
    loop, rounds = Loop(given), given.part.rounds
    weights = _copy(loop.weights())
    for round in range(rounds):
        results = []
        for site in sites:
            loop.load(weights)
            loop.validate(site.site, round)
            tokens = loop.train(site, round)
            results.append((tokens, _copy(loop.weights())))
        weights = _mean(results)
    loop.load(weights)
    for site in sites:
        loop.validate(site.site, rounds)
    torch.save(weights, into)


def _copy(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in weights.items()}


def _mean(results: list[tuple[int, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """The sites' models averaged by the answer tokens that each was trained on."""
    total = sum(tokens for tokens, _ in results)
    return {
        name: torch.stack([weights[name] * (tokens / total) for tokens, weights in results]).sum(0)
        for name in results[0][1]
    }


if __name__ == "__main__":
    run(Input(Path(sys.argv[1])), Path(sys.argv[2]))
