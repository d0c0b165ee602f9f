"""Comparing weights that were trained in two ways."""

from collections.abc import Mapping

import torch
from torch import Tensor

# More than AdamW walks, in any direction, in the few steps that tests train.
_STEPS_OF_ROUNDING = 1e-2


def assert_same_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], atol: float) -> None:
    """Weights of a GPT-2 layout by name: equal to `atol`, and biases of attention's keys to what AdamW walks.

    A key's bias adds the same to all scores of a query, which softmax ignores: its gradient is nothing but
    rounding, and AdamW makes steps of it.
    """
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        pairs = [(found[name], tensor, atol)]
        if name.endswith("c_attn.bias"):
            tolerances = (atol, _STEPS_OF_ROUNDING, atol)  # of queries, keys and values
            pairs = list(zip(found[name].chunk(3), tensor.chunk(3), tolerances, strict=True))
        for one, other, tolerance in pairs:
            message = f"{name}: {(one - other).abs().max():.2g} apart, expected at most {tolerance:.2g}"
            torch.testing.assert_close(one, other, atol=tolerance, rtol=0, msg=message)
