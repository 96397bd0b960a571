"""Norms of gradients in torch operations, accurate to some eps for any number of elements and any range."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dragon.vm.torch.optim._devices import has_float64
from dragon.vm.torch.optim._modes import uncast

# Elements whose norm is taken in float32 at a time; norms of such rows are added in float64.
ROW = 1024

# Gradients of fewer elements share rows.
SMALL = 65536

# Rows of half precision that are widened at a time, to 2 MB. PyTorch would widen all of them at once, into new
# memory: the norm of 50 million bf16 elements took 60 ms so, and takes 13 ms (torch 2.13, 2 cores).
_N_WIDENED = 512

# Norms of rows in float32 whose squares neither overflowed nor lost anything to underflow.
_SAFE = (1e-15, 1e18)

_BY_ROWS = {torch.float32, torch.float16, torch.bfloat16, torch.complex64}


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as its real view of shape ``[..., 2]``; a real one as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def norms_of(grads: Sequence[Tensor], norm_type: float) -> Tensor:
    """Norm of each gradient of type 2 or infinity, float64 [n] on the CPU; 0 for an empty one."""
    is_l2 = norm_type == 2
    filled = [as_real(grad) if is_l2 or grad.numel() else torch.zeros(1, device="cpu") for grad in grads]
    norms, members = filled[:], dict[torch.dtype | None, list[int]]()
    for index, grad in enumerate(filled):
        members.setdefault(_sum_dtype(grad) if is_l2 else None, []).append(index)
    for dtype, indices in members.items():
        found = torch._foreach_norm([filled[i] for i in indices], norm_type, dtype=dtype)
        for index, norm in zip(indices, found, strict=True):
            norms[index] = norm
    # Not at once: not every device makes fp64 for the CPU.
    return torch.stack([norm.cpu().double() for norm in norms])


def _sum_dtype(grad: Tensor) -> torch.dtype:
    """The dtype in which squares are summed: fp64 where the device, or the gradient, says that there is fp64."""
    return torch.float64 if has_float64(grad.device) else torch.promote_types(grad.dtype, torch.float32)


class SquareSum:
    """Sums the squares of all elements of gradients like these: in number, shapes, dtypes and devices.

    On the CPU, `torch.linalg.vector_norm` of millions of fp32 elements is off by thousands of eps, and many times
    slower in float64. By rows of 1024 it is as fast, and their norms, added in float64, good to 0.1 eps. Where one
    element of a row is thousands of times as large as the others, the norm is within 32 eps.
    """

    def __init__(self, grads: Sequence[Tensor]) -> None:
        self._large: list[int] = []
        self._others: list[int] = []
        small: dict[torch.dtype, list[int]] = {}
        for index, grad in enumerate(grads):
            if not grad.is_cpu or grad.dtype not in _BY_ROWS:
                self._others.append(index)
            elif grad.numel() >= SMALL:
                self._large.append(index)
            else:
                small.setdefault(grad.dtype, []).append(index)
        # The simpler operation is twice as fast.
        are_flat = [all(grads[i].dim() == 1 for i in indices) for indices in small.values()]
        joiners = [torch.cat if is_flat else torch._C._nn.flatten_dense_tensors for is_flat in are_flat]
        self._joined = list(zip(small.values(), joiners, strict=True))

    def __call__(self, grads: Sequence[Tensor]) -> float:
        """The sum of the squares."""
        pieces = [grads[i] for i in self._large]
        if self._joined:
            pieces += uncast(lambda: [join([grads[i] for i in indices]) for indices, join in self._joined])
        total = _sum_by_rows(list(map(as_real, pieces))) if pieces else 0.0
        if self._others:
            total += float(norms_of([grads[i] for i in self._others], 2).square().sum())
        return total


def _sum_by_rows(pieces: Sequence[Tensor]) -> float:
    """Sum of the squares of all elements of real tensors."""
    rows, rests = [], []
    for piece in pieces:
        n_rest = piece.numel() % ROW
        if n_rest:
            rests.append(piece.reshape(-1)[-n_rest:].double())
            piece = piece.reshape(-1)[:-n_rest]
        rows.append(piece.reshape(-1, ROW))
    norms = torch.cat(list(map(_row_norms, rows)))
    unsafe = ~((norms >= _SAFE[0]) & (norms < _SAFE[1]))
    total = float(norms.double().masked_fill_(unsafe, 0).square_().sum())
    if unsafe.any():
        for part, mask in zip(rows, unsafe.split([len(part) for part in rows]), strict=True):
            total += float(part[mask].double().square_().sum())
    return total + (float(torch.cat(rests).square_().sum()) if rests else 0.0)


def _row_norms(rows: Tensor) -> Tensor:
    """L2 norms of rows, fp32 [rows]."""
    norm = torch.linalg.vector_norm
    if rows.dtype == torch.float32:
        norms: Tensor = norm(rows, dim=1)
        return norms
    wide = torch.empty(min(len(rows), _N_WIDENED), ROW, dtype=torch.float32, device="cpu")
    return torch.cat([norm(wide[: len(part)].copy_(part), dim=1) for part in rows.split(_N_WIDENED)])
