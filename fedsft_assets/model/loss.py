"""Cross entropy over a large vocabulary, and logits only where they are needed.

Both exist to save memory: at 49,152 tokens of vocabulary, a copy of the logits of 4,096 positions is
0.8 GB, and a plain loss makes four of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_CHUNK = 1 << 22  # logits that are worked on at a time: 16 MB in fp32


class _SummedCrossEntropy(torch.autograd.Function):
    """Keeps the logits and one number a row for the backward pass; autograd would keep a copy of all."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        normalizers = torch.cat([part.float().logsumexp(-1) for part in logits.split(_rows(logits))])
        picked = logits.gather(1, targets[:, None]).squeeze(1).float()
        ctx.save_for_backward(logits, targets, normalizers)
        return (normalizers - picked).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, targets, normalizers = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        rows = _rows(logits)
        for part, target, normalizer, out in zip(
            logits.split(rows), targets.split(rows), normalizers.split(rows), gradient.split(rows), strict=True
        ):
            probabilities = (part.float() - normalizer[:, None]).exp_()
            probabilities.scatter_add_(1, target[:, None], probabilities.new_full((len(target), 1), -1.0))
            out.copy_(probabilities.mul_(grads[0]))
        return gradient, None


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum of -log softmax(logits)[target], a scalar in fp32 whatever the logits' type.

    `logits` [N, V], `targets` [N] int64, all of them valid; N may be 0. Equal to
    `torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")`.
    """
    if not len(targets):
        return logits.float().sum()
    return _SummedCrossEntropy.apply(logits, targets)


@contextmanager
def head_only_at(head: nn.Module | None, positions: Tensor) -> Iterator[list[bool]]:
    """Within the block, the output projection sees only some positions: [B, T, D] becomes [1, N, D].

    `positions` [N] index the flattened [B * T]. What an architecture does to logits afterwards (soft
    caps, scales) works on each of them alone, so it stays right. Yields a list that is empty as long
    as the projection was not called through its module: then the logits are those of all positions.
    """
    called: list[bool] = []

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        called.append(True)
        return (args[0].flatten(0, 1).index_select(0, positions)[None], *args[1:])

    handle = head.register_forward_pre_hook(select) if head is not None else None
    try:
        yield called
    finally:
        if handle is not None:
            handle.remove()


def _rows(logits: Tensor) -> int:
    return max(1, _CHUNK // logits.shape[1])
