"""Trains as one contender of the training benchmark, in a process of its own, and prints what was noted as JSON."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from benchmarks.training.data import TrainingInput
from benchmarks.training.watch import Trained, Watch


def train(contender: str, given: TrainingInput) -> Trained:
    """Train over the input's batches; each side imports only what it needs."""
    watch = Watch()
    return watch.trained(_contender(contender)(given, watch))


def _contender(name: str) -> Callable[[TrainingInput, Watch], float]:
    if name == "ours":
        from benchmarks.training.ours import ours

        return ours
    from benchmarks.rivals import RIVALS

    return RIVALS[name]


if __name__ == "__main__":
    print(json.dumps(asdict(train(sys.argv[1], TrainingInput.read(Path(sys.argv[2]))))))
