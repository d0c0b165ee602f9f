"""Memory-efficient cross entropy of a causal language model over a large vocabulary.

Logits are computed only at positions that predict an answer token, a few at a time: with a vocabulary of 49,152
tokens, the logits of 4,096 positions take 0.8 GB, and a plain loss makes four copies.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

# Number of logits per chunk: 128 MB in fp32. With a quarter of that, matrix products are a tenth slower.
_CHUNK = 1 << 25


class _HeadLoss(torch.autograd.Function):
    """The output projection and its summed cross entropy, by chunks of positions.

    Because the loss is a sum, its gradients are known up to a factor: the forward pass computes them while it has a
    chunk's logits, and the backward pass only scales them.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int) -> Tensor:
        wants_hidden, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros_like(weight) if wants_weight else None
        d_bias = torch.zeros_like(bias) if wants_bias and bias is not None else None
        rows = _rows(len(weight), chunk)
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
        return (*(None if d is None else d.mul_(grads[0]) for d in ctx.saved_tensors), None, None)


def head_loss(hidden: Tensor, head: nn.Linear, targets: Tensor, chunk: int = _CHUNK) -> Tensor:
    """The sum of -log softmax(head(hidden))[target], an fp32 scalar; supports one backward pass only.

    `hidden` [N, D], `targets` [N] int64, all valid; N may be 0. Equal to
    `torch.nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")`, with the memory
    of a few chunks of `chunk` logits.
    """
    return _HeadLoss.apply(hidden, head.weight, head.bias, targets, chunk)


class _SummedCrossEntropy(torch.autograd.Function):
    """Keeps only the logits and one number per row for the backward pass; autograd would also keep a copy of them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, chunk: int) -> Tensor:
        ctx.rows = _rows(logits.shape[1], chunk)
        normalizers = torch.cat([part.float().logsumexp(-1) for part in logits.split(ctx.rows)])
        picked = logits.gather(1, targets[:, None]).squeeze(1).float()
        ctx.save_for_backward(logits, targets, normalizers)
        return (normalizers - picked).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits, targets, normalizers = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        rows = ctx.rows
        for part, target, normalizer, out in zip(
            logits.split(rows), targets.split(rows), normalizers.split(rows), gradient.split(rows), strict=True
        ):
            probabilities = (part.float() - normalizer[:, None]).exp_()
            probabilities.scatter_add_(1, target[:, None], probabilities.new_full((len(target), 1), -1.0))
            out.copy_(probabilities.mul_(grads[0]))
        return gradient, None, None


def summed_cross_entropy(logits: Tensor, targets: Tensor, chunk: int = _CHUNK) -> Tensor:
    """The sum of -log softmax(logits)[target], an fp32 scalar for any dtype of the logits.

    `logits` [N, V], `targets` [N] int64, all valid; N may be 0. Equal to
    `torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")`.
    """
    if not len(targets):
        return logits.float().sum()
    return _SummedCrossEntropy.apply(logits, targets, chunk)


@torch.no_grad()
def head_losses(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """-log softmax(head(hidden))[target] of each target, fp32 [N]; `head_loss` is their sum. Without gradients."""
    parts = zip(*(whole.split(_rows(len(head.weight))) for whole in (hidden, targets)), strict=True)
    return torch.cat([cross_entropies(head(part), target) for part, target in parts])


@torch.no_grad()
def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[target] of each target, fp32 [N]; `summed_cross_entropy` is their sum. Without gradients."""
    parts = zip(*(whole.split(_rows(logits.shape[1])) for whole in (logits, targets)), strict=True)
    return torch.cat([cross_entropy(part.float(), target, reduction="none") for part, target in parts])


@contextmanager
def head_only_at(head: nn.Module | None, positions: Tensor) -> Iterator[list[bool]]:
    """Within the block, the output projection sees only some positions: [B, T, D] becomes [1, N, D].

    `positions` [N] index the flattened [B * T]. Architectures process logits further only elementwise (soft caps,
    scales), so results stay correct. Yields a list that stays empty if the projection was not called through its
    module; the logits are then those of all positions.
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
    """Within the block, the output projection computes no logits; yields a list that collects its inputs [B, T, D]."""
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
    """total += d_logits^T hidden, in one pass over `total` if dtypes allow it."""
    if total.dtype == d_logits.dtype == hidden.dtype and not torch.is_autocast_enabled(total.device.type):
        total.addmm_(d_logits.t(), hidden)
    else:
        total += linear(d_logits.t(), hidden.t())


def _rows(vocabulary: int, chunk: int = _CHUNK) -> int:
    return max(1, chunk // vocabulary)
