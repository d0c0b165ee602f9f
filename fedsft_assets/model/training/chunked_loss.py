"""The loss of a causal language model on answer tokens: cross entropy over a large vocabulary, in little memory.

Logits exist only at the positions that predict an answer token, and of those a few at a time: at
49,152 tokens of vocabulary, a copy of the logits of 4,096 positions is 0.8 GB, and a plain loss makes
four of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

# Logits that are worked on at a time: 128 MB in fp32. A quarter of it costs matrix products a tenth of their speed.
_CHUNK = 1 << 25


class _HeadLoss(torch.autograd.Function):
    """The output projection and its summed cross entropy, chunk by chunk of positions.

    The loss is a sum, so its gradients are known at once up to a factor: they are made while a chunk's
    logits are there, and the backward pass only scales them.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        wants_hidden, wants_weight, wants_bias, _ = ctx.needs_input_grad
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros_like(weight) if wants_weight else None
        d_bias = torch.zeros_like(bias) if wants_bias and bias is not None else None
        rows = max(1, _CHUNK // len(weight))
        for start in range(0, len(targets), rows):
            part, target = hidden[start : start + rows], targets[start : start + rows]
            log_probabilities = linear(part, weight, bias).float().log_softmax(-1)
            total -= log_probabilities.gather(1, target[:, None]).sum()
            if d_hidden is None and d_weight is None:
                continue
            d_logits = log_probabilities.exp_()
            d_logits.scatter_add_(1, target[:, None], d_logits.new_full((len(target), 1), -1.0))
            if d_hidden is not None:
                d_hidden[start : start + rows] = linear(d_logits, weight.t())
            if d_weight is not None:
                _add_product(d_weight, d_logits, part)
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*(None if d is None else d.mul_(grads[0]) for d in ctx.saved_tensors), None)


def head_loss(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """The sum of -log softmax(head(hidden))[target], a scalar in fp32; one backward pass only.

    `hidden` [N, D], `targets` [N] int64, all of them valid; N may be 0. Equal to
    `torch.nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")`, at the memory
    of a few chunks of 32 million logits.
    """
    return _HeadLoss.apply(hidden, head.weight, head.bias, targets)


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


@torch.no_grad()
def head_losses(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """-log softmax(head(hidden))[target] of each target, fp32 [N]; `head_loss` is their sum. Without gradients."""
    parts = zip(*(whole.split(max(1, _CHUNK // len(head.weight))) for whole in (hidden, targets)), strict=True)
    return torch.cat([cross_entropies(head(part), target) for part, target in parts])


@torch.no_grad()
def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] of each target, fp32 [N]; `summed_cross_entropy` is their sum. Without gradients."""
    parts = zip(*(whole.split(_rows(logits)) for whole in (logits, targets)), strict=True)
    return torch.cat([cross_entropy(part.float(), target, reduction="none") for part, target in parts])


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


@contextmanager
def head_input(head: nn.Module) -> Iterator[list[Tensor]]:
    """Within the block, the output projection makes no logits; yields a list that gets what it would make them of."""
    hidden: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden.append(args[0])
        return (args[0][:, :0], *args[1:])

    handle = head.register_forward_pre_hook(keep)
    try:
        yield hidden
    finally:
        handle.remove()


def _add_product(total: Tensor, d_logits: Tensor, hidden: Tensor) -> None:
    """total += d_logits^T hidden, in one pass over `total` where types allow it."""
    if total.dtype == d_logits.dtype == hidden.dtype and not torch.is_autocast_enabled(total.device.type):
        total.addmm_(d_logits.t(), hidden)
    else:
        total += linear(d_logits.t(), hidden.t())


def _rows(logits: Tensor) -> int:
    return max(1, _CHUNK // logits.shape[1])
