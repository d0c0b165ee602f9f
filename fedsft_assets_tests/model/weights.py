"""Comparing weights that were trained in two ways."""

from collections.abc import Mapping

import torch
from torch import Tensor


def assert_same_weights(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], atol: float) -> None:
    """Weights of a GPT-2 layout by name, all but the biases of attention's keys.

    A key's bias adds the same to all scores of a query, which softmax ignores: its gradient is nothing but
    rounding, and AdamW makes steps of it.
    """
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(_that_matter(name, found[name]), _that_matter(name, tensor), atol=atol, rtol=0)


def _that_matter(name: str, tensor: Tensor) -> Tensor:
    if not name.endswith("c_attn.bias"):
        return tensor
    query, _, value = tensor.chunk(3)
    return torch.cat([query, value])
