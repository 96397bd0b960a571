"""A contender's first steps against torch's Adam in float64, on elements of every tensor."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.workload import BETAS, LOSS_SCALE, MAX_GRAD_NORM, Origin, Workload, group_bounds, has_grad, lr_of

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
        groups, lrs = [], []
        every: list[tuple[Tensor, Tensor]] = []
        for i, (first, end) in enumerate(group_bounds(len(params), n_groups)):
            # One leaf a group, unless some of it has no gradient.
            cuts = range(first, end + 1) if origin.case.changing else (first, end)
            leaves = [torch.nn.Parameter(torch.cat(params[a:b]).cpu().double()) for a, b in pairwise(cuts)]
            groups.append({"params": leaves, "lr": lr_of(i, n_groups)})
            lrs += [torch.full_like(leaf, lr_of(i, n_groups)) for leaf in leaves]
            given = [torch.cat(grads[a:b]).cpu().double() * factor for a, b in pairwise(cuts)]
            every += zip(leaves, given, strict=True)
        optimizer = torch.optim.Adam(
            groups, betas=BETAS, eps=origin.eps, amsgrad=origin.case.amsgrad, foreach=False
        )
        for n_steps in range(1, N_STEPS + 1):
            for i, group in enumerate(optimizer.param_groups):
                group["lr"] = lr_of(i, n_groups, n_steps)
            for i, (leaf, grad) in enumerate(every):
                leaf.grad = grad if has_grad(origin.case, i, n_steps) else None
            optimizer.step()
        self._params = torch.cat([leaf.detach() for leaf, _ in every])
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
