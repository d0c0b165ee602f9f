"""The training benchmark's parts, each a model, a shape of batches and who takes part; imports nothing heavy."""

from dataclasses import dataclass, replace
from typing import Self

RIVALS = ("plain", "trainer", "trainer-grouped", "trl", "trl-packing")
CONTENDERS = ("ours", *RIVALS)
# The others choose their own order, so their steps have other losses; the first batch is the same for all.
SAME_BATCHES = ("ours", "plain", "trainer", "trl")


@dataclass(frozen=True)
class Part:
    """What all contenders of one part are given.

    `model` is a preset's name, or `gpt2-small` for that shape with random weights. A step takes
    `batch_size` records of at most `max_length` tokens; the first of `steps` warms up and is not timed.
    """

    name: str
    model: str
    batch_size: int
    max_length: int
    learning_rate: float
    steps: int
    repeats: int
    contenders: tuple[str, ...]

    def quick(self) -> Self:
        """The same work in a few small steps: shows that all of it runs, not how fast."""
        return replace(self, steps=3, repeats=1, batch_size=min(self.batch_size, 4), max_length=64)


PARTS = {
    part.name: part
    for part in (
        Part("tiny", "tiny", 8, 256, 1e-3, steps=60, repeats=3, contenders=CONTENDERS),
        Part("smollm2", "smollm2-135m", 8, 512, 1e-4, steps=4, repeats=1, contenders=("ours", "plain", "trainer")),
        Part("gpt2-small", "gpt2-small", 8, 512, 1e-4, steps=4, repeats=1, contenders=("ours",)),
    )
}
