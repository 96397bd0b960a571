"""Norms of gradients in torch operations, accurate to a few eps for any number of elements and any range."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import compress
from operator import attrgetter, not_

import torch
from torch import Tensor

from dragon.vm.torch.optim._layout import as_real

# Elements whose norm is taken in float32 at a time; norms of such rows are added in float64.
ROW = 1024

# Gradients of fewer elements share rows.
SMALL = 65536

# Norms of rows in float32 whose squares neither overflowed nor lost anything to underflow.
_SAFE = (1e-15, 1e18)

_read_kind = attrgetter("is_cpu", "dtype")
_BY_ROWS = {(True, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.complex64)}


def inf_norms(grads: Sequence[Tensor]) -> Tensor:
    """Largest magnitude of each gradient, 0 for an empty one, float64 [n] on the CPU."""
    filled = [as_real(grad) if grad.numel() else torch.zeros(1, device="cpu") for grad in grads]
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
    kinds = list(map(_read_kind, grads))
    total = 0.0
    for kind in set(kinds):
        of_kind = grads if len(set(kinds)) == 1 else list(compress(grads, (other == kind for other in kinds)))
        if kind in _BY_ROWS:
            total += math.fsum(map(_sum_by_rows, _pieces(of_kind)))
        else:
            total += float(l2_norms(of_kind).square().sum())
    return total


def _pieces(grads: Sequence[Tensor]) -> Iterator[Tensor]:
    """All elements in 1-dim real tensors: a large gradient each, small ones joined."""
    is_large = [numel >= SMALL for numel in map(Tensor.numel, grads)]
    yield from (as_real(grad).reshape(-1) for grad in compress(grads, is_large))
    small = list(compress(grads, map(not_, is_large)))
    if small:
        yield as_real(torch._C._nn.flatten_dense_tensors(small)).reshape(-1)


def _sum_by_rows(piece: Tensor) -> float:
    whole = piece.numel() // ROW * ROW
    rows = piece[:whole].view(-1, ROW)
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
    unsafe = (norms < _SAFE[0]) | ~(norms < _SAFE[1])
    total = float(norms.double().masked_fill(unsafe, 0).square().sum())
    if unsafe.any():
        total += float(rows[unsafe].double().square().sum())
    return total + float(piece[whole:].double().square().sum())
