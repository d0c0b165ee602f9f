"""How much of what a bare matrix multiplication reaches is left in training, for GPT-2's smallest shape.

Counts the operations that a training without padding needs, not those that one happens to do: linear
layers and causal attention at each token, the output projection at answers only, and a backward pass
twice as dear as the forward pass. A process of its own, which prints what it found as JSON.
"""

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from benchmarks.training.data import TrainingInput
from benchmarks.training.run import train

_ROWS = 4096  # of a matrix product: a batch of 8 full records of 512 tokens
_REPEATS = 8


@dataclass(frozen=True)
class Shape:
    """GPT-2's layout: layers, width and vocabulary."""

    layers: int
    width: int
    vocabulary: int

    @classmethod
    def read(cls, hugging_face: Path) -> "Shape":
        config = json.loads((hugging_face / "config.json").read_text(encoding="utf-8"))
        return cls(config["n_layer"], config["n_embd"], config["vocab_size"])

    @property
    def products(self) -> list[tuple[int, int]]:
        """Inner and outer size of a layer's matrix products: attention in and out, MLP in and out."""
        width = self.width
        return [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]


@dataclass(frozen=True)
class Share:
    """Operations per second, in 1e9: of training, of bare products before and after it; tokens per second."""

    training: float
    before: float
    after: float
    tokens_per_second: float

    @property
    def of_product(self) -> float:
        return self.training / mean([self.before, self.after])


def step_operations(shape: Shape, lengths: Iterable[int], answers: int) -> int:
    """Floating-point operations of a step over records of these lengths with that many answer tokens.

    A product with an [n, m] matrix is 2·n·m for each token. A query meets itself and the keys before
    it, for the scores and for the values: T·(T + 1) / 2 pairs of 4·width operations for each layer.
    """
    lengths = list(lengths)
    linear = 2 * sum(inner * outer for inner, outer in shape.products) * shape.layers * sum(lengths)
    attention = sum(4 * shape.width * shape.layers * length * (length + 1) // 2 for length in lengths)
    output = 2 * shape.width * shape.vocabulary * answers
    return 3 * (linear + attention + output)


def product_speed(shape: Shape) -> float:
    """1e9 operations per second of fp32 `torch.mm` over a layer's four products, each at its best of several."""
    import torch

    operations, seconds = 0.0, 0.0
    for inner, outer in shape.products:
        left, right = torch.randn(_ROWS, inner), torch.randn(inner, outer)
        result = torch.empty(_ROWS, outer)
        times = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            torch.mm(left, right, out=result)
            times.append(time.perf_counter() - start)
        operations += 2 * _ROWS * inner * outer
        seconds += min(times)
    return operations / seconds / 1e9


def measure_share(contender: str, given: TrainingInput) -> Share:
    """Train as that contender, between two measurements of bare products."""
    shape = Shape.read(given.hugging_face)
    before = product_speed(shape)
    trained = train(contender, given)
    after = product_speed(shape)
    operations = sum(
        step_operations(
            shape,
            [len(given.ids[index]) - 1 for index in batch],  # nothing follows the last token
            sum(len(given.ids[index]) - given.prompts[index] for index in batch),
        )
        for batch in given.batches[1:]
    )
    return Share(operations / trained.seconds / 1e9, before, after, trained.tokens_per_second)


if __name__ == "__main__":
    print(json.dumps(asdict(measure_share(sys.argv[1], TrainingInput.read(Path(sys.argv[2]))))))
