"""Norms of gradients in torch operations, accurate to a few eps for any number of elements and any range."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dragon.vm.torch.optim._layout import as_real

# Elements that are squared and added at a time: 1 MiB of float32, which stays in a core's cache.
BLOCK = 262144

# Sums of squares in float32 that neither overflowed nor lost anything to underflow.
_SAFE = (1e-30, 1e38)


def inf_norms(grads: Sequence[Tensor]) -> Tensor:
    """Largest magnitude of each gradient, float64 [n] on the CPU."""
    norms = torch._foreach_norm([as_real(grad) for grad in grads], math.inf)
    return torch.stack([norm.to("cpu", torch.float64) for norm in norms])


def l2_norms(grads: Sequence[Tensor]) -> Tensor:
    """L2 norm of each gradient, float64 [n] on the CPU."""
    norms = torch._foreach_norm([as_real(grad) for grad in grads], 2, dtype=torch.float64)
    return torch.stack([norm.cpu() for norm in norms])


def sum_of_squares(grads: Sequence[Tensor]) -> float:
    """Sum of the squares of all elements.

    `torch.linalg.vector_norm` is off by thousands of eps for millions of fp32 elements on the CPU, and many times
    slower in float64. So blocks are squared and added in float32, by torch's cascading sum, and their sums in
    float64; a block whose squares leave the range of float32 is done again in float64.
    """
    on_cpu = [grad for grad in grads if grad.device.type == "cpu" and grad.dtype != torch.float64]
    others = [grad for grad in grads if grad.device.type != "cpu" or grad.dtype == torch.float64]
    total = math.fsum(map(_block_sum, _blocks(on_cpu)))
    if others:
        total += float(l2_norms(others).square().sum())
    return total


def _blocks(grads: Sequence[Tensor]) -> Iterator[Tensor]:
    """The elements of all gradients in pieces of about `BLOCK` elements, fp32 [n]; small gradients share one."""
    small: list[Tensor] = []
    n_small = 0
    for grad in grads:
        flat = as_real(grad).reshape(-1)
        if len(flat) >= BLOCK:
            yield from flat.split(BLOCK)
            continue
        small.append(flat)
        n_small += len(flat)
        if n_small >= BLOCK:
            yield torch.cat(small)
            small, n_small = [], 0
    if small:
        yield torch.cat(small)


def _block_sum(block: Tensor) -> float:
    block = block.float()
    total = float((block * block).sum())
    if _SAFE[0] < total < _SAFE[1] or not block.any():
        return total
    return float(block.double().square().sum())
