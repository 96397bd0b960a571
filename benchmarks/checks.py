"""A contender's first steps against torch's Adam in float64, on elements of every tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.workload import BETAS, LOSS_SCALE, MAX_GRAD_NORM, Origin, Workload, group_bounds, lr_of

N_STEPS = 3

# Elements that are looked at in each tensor, its first and its last among them.
N_SAMPLES = 32


class Expected:
    """Parameters after `N_STEPS` steps of `torch.optim.Adam`, in float64, at some elements of every tensor.

    Args:
        origin: where the steps start.
    """

    def __init__(self, origin: Origin) -> None:
        params, grads = samples(origin.params), samples(origin.grads)
        factor = chain_factor(origin.grads) if origin.case.chain else 1.0
        n_groups = origin.case.n_groups
        leaves, groups, lrs = [], [], []
        for i, (first, end) in enumerate(group_bounds(len(params), n_groups)):
            leaf = torch.nn.Parameter(torch.cat(params[first:end]).cpu().double())
            leaf.grad = torch.cat(grads[first:end]).cpu().double() * factor
            leaves.append(leaf)
            groups.append({"params": [leaf], "lr": lr_of(i, n_groups)})
            lrs.append(torch.full_like(leaf, lr_of(i, n_groups)))
        optimizer = torch.optim.Adam(
            groups, betas=BETAS, eps=origin.eps, amsgrad=origin.case.amsgrad, foreach=False
        )
        for n_steps in range(1, N_STEPS + 1):
            for i, group in enumerate(optimizer.param_groups):
                group["lr"] = lr_of(i, n_groups, n_steps)
            optimizer.step()
        self._params = torch.cat([leaf.detach() for leaf in leaves])
        self._lrs = torch.cat(lrs).detach()
        self._eps = torch.finfo(origin.precision.param).eps

    def largest_error(self, params: list[Tensor]) -> float:
        """The largest distance of an element, beyond its own rounding, in learning rates a step; may be NaN."""
        found = torch.cat(samples(params)).cpu().double()
        # On its way a parameter was at most this much larger than where it ends.
        rounding = N_STEPS * self._eps * (self._params.abs() + N_STEPS * self._lrs)
        distance = (found - self._params).abs() - rounding
        return float((distance.clamp_min(0) / (N_STEPS * self._lrs)).max())


def samples(tensors: list[Tensor]) -> list[Tensor]:
    """Some elements of each tensor, 1-D, evenly spread from the first to the last."""
    taken = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        taken.append(torch.cat([flat[:: max(1, len(flat) // N_SAMPLES)], flat[-1:]]))
    return taken


def chain_factor(grads: list[Tensor]) -> float:
    """What unscaling and clipping multiply gradients by."""
    squares = sum(float(torch.linalg.vector_norm(grad, dtype=torch.float64)) ** 2 for grad in grads)
    norm: float = squares**0.5 / LOSS_SCALE
    return min(1.0, MAX_GRAD_NORM / (norm + 1e-6)) / LOSS_SCALE


def check(workload: Workload, step: Callable[[], object], expected: Expected) -> float:
    """Take the first steps of a contender and return its error, as `Expected.largest_error`."""
    for _ in range(N_STEPS):
        workload.before_step()
        step()
    return expected.largest_error([param.detach() for param in workload.params])
