"""Perplexity: what a mean loss is often told as."""

import math

_LARGEST_EXPONENT = 700.0  # of a float64


def perplexity(loss: float) -> float:
    """exp(loss) of a mean loss in nats; infinite where a float64 cannot hold it."""
    return math.exp(loss) if loss < _LARGEST_EXPONENT else math.inf
