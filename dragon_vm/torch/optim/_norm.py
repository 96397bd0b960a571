"""Norms of gradients in torch operations, accurate to a few eps for any number of elements and any range."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dragon.vm.torch.optim._layout import as_real

# Elements whose norm is taken in float32 at a time; norms of such rows are added in float64.
ROW = 1024

# Gradients of fewer elements share rows.
SMALL = 65536

# Norms of rows in float32 whose squares neither overflowed nor lost anything to underflow.
_SAFE = (1e-15, 1e18)


def inf_norms(grads: Sequence[Tensor]) -> Tensor:
    """Largest magnitude of each gradient, 0 for an empty one, float64 [n] on the CPU."""
    filled = [as_real(grad) if grad.numel() else torch.zeros(1) for grad in grads]
    norms = torch._foreach_norm(filled, math.inf)
    return torch.stack([norm.to("cpu", torch.float64) for norm in norms])


def l2_norms(grads: Sequence[Tensor]) -> Tensor:
    """L2 norm of each gradient, float64 [n] on the CPU."""
    norms = torch._foreach_norm([as_real(grad) for grad in grads], 2, dtype=torch.float64)
    return torch.stack([norm.cpu() for norm in norms])


def sum_of_squares(grads: Sequence[Tensor]) -> float:
    """Sum of the squares of all elements.

    On the CPU, `torch.linalg.vector_norm` of millions of fp32 elements is off by thousands of eps, and many times
    slower in float64. By rows of 1024 it is as fast, and their norms, added in float64, good to 0.1 eps.
    """
    by_rows = [grad for grad in grads if grad.device.type == "cpu" and grad.dtype != torch.float64]
    others = [grad for grad in grads if grad.device.type != "cpu" or grad.dtype == torch.float64]
    total = math.fsum(map(_sum_by_rows, _pieces(by_rows)))
    if others:
        total += float(l2_norms(others).square().sum())
    return total


def _pieces(grads: Sequence[Tensor]) -> Iterator[Tensor]:
    """All elements in 1-dim tensors: a large gradient each, small ones joined."""
    flat = [as_real(grad).reshape(-1) for grad in grads]
    yield from (grad for grad in flat if len(grad) >= SMALL)
    small = [grad for grad in flat if len(grad) < SMALL]
    if small:
        yield torch.cat(small)


def _sum_by_rows(piece: Tensor) -> float:
    whole = len(piece) // ROW * ROW
    rows = piece[:whole].view(-1, ROW)
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
    unsafe = (norms < _SAFE[0]) | ~(norms < _SAFE[1])
    total = float(norms.double().masked_fill(unsafe, 0).square().sum())
    if unsafe.any():
        total += float(rows[unsafe].double().square().sum())
    return total + float(piece[whole:].double().square().sum())
